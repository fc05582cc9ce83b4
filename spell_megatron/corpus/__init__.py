"""From texts on disk to clusters of documents: read, clean, de-duplicate, group, sample.

The rest of the system needs three names: `ClusterSampler`; `StaticQuestions`, which puts fixed questions on
its clusters; and `load_heldout`, for measuring.
"""

from spell_megatron.corpus.heldout import load_heldout
from spell_megatron.corpus.sampler import ClusterSampler
from spell_megatron.corpus.static import StaticQuestions

__all__ = ["ClusterSampler", "StaticQuestions", "load_heldout"]
