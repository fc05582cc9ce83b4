"""From texts on disk to clusters of documents: read, clean, de-duplicate, group, sample.

The rest of the system needs four names: `ClusterSampler`; `StaticQuestions`, which puts fixed questions on
its clusters; `load_heldout`, for measuring; and `survey`, which shows what a run would read.
"""

from spell_megatron.corpus.heldout import load_heldout
from spell_megatron.corpus.sampler import ClusterSampler
from spell_megatron.corpus.static import StaticQuestions
from spell_megatron.corpus.survey import survey

__all__ = ["ClusterSampler", "StaticQuestions", "load_heldout", "survey"]
