"""From texts on disk to clusters of documents: read, clean, de-duplicate, group, sample.

The rest of the system needs one name: `ClusterSampler`.
"""

from spell_megatron.corpus.sampler import ClusterSampler

__all__ = ["ClusterSampler"]
