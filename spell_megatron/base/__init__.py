"""What every room stands on: files, folders, child processes, places of ranks and engines, registries."""
