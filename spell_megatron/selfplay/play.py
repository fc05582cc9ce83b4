"""Self-play of one step: rounds of questions until the batch is full (dynamic sampling).

Within a round many episodes run at once and finish in any order. What counts is their own order: the
step ends at the first episode, counted from the round's start, with which N questions are kept.
Everything before it belongs to the step, and the corpus is wound back to it, so that a step is the same
however fast its parts were; what was begun behind it is dropped or carried over (`leftovers`). With
`selfplay.whole_rounds` the step ends with the round instead: what is kept beyond N is remembered and not
trained on. Memory is read as it stood when the round began and written when the round has ended.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Protocol

from spell_megatron import config
from spell_megatron.selfplay.baselines import Baselines
from spell_megatron.selfplay.batch import Batch, compose
from spell_megatron.selfplay.curriculum import remembered_documents
from spell_megatron.selfplay.episode import Episode
from spell_megatron.selfplay.leftovers import Leftover, Tally, cancel
from spell_megatron.selfplay.memory import Memory
from spell_megatron.selfplay.pipeline import play_episode
from spell_megatron.selfplay.ports import Codec, Generator, Judge
from spell_megatron.selfplay.prompts import Prompts
from spell_megatron.selfplay.rewards import OUTVOTED, UNJUDGED
from spell_megatron.selfplay.roles import Role, roles_of
from spell_megatron.selfplay.round import Round
from spell_megatron.selfplay.seeds import random_of
from spell_megatron.selfplay.stages import staged, tokens_at
from spell_megatron.selfplay.tasks import TASKS
from spell_megatron.selfplay.writer import Job, Writer
from spell_megatron.types import Cluster, Question, SpellError


class Clusters(Protocol):
    """Where the clusters come from, each with the task to set on it, or with a fixed question."""

    def draw(self, n: int) -> Sequence[tuple[Cluster, str | Question]]:
        """The next `n`; never runs out."""
        ...

    def state(self) -> Any: ...

    def restore(self, state: Any) -> None: ...


class StarvedError(SpellError):
    """The rounds are over and the batch is not full. `episodes` are those of the step."""

    def __init__(self, message: str, episodes: Sequence[Episode]) -> None:
        super().__init__(message)
        self.episodes = tuple(episodes)
        # Another attempt would read the same episodes, but those whose judge was down.
        if all(episode.outcome != UNJUDGED for episode in episodes):
            self.exit_code = 2


@dataclass(frozen=True, slots=True)
class Play:
    """One step of self-play.

    `episodes` in their own order, over `rounds` rounds; `batch` what the learner gets of them;
    `remembered` questions in memory after it, over `rings` pairs of task and cluster. `tally` counts
    every episode that was begun for it, needed or not.
    """

    step: int
    episodes: tuple[Episode, ...]
    batch: Batch
    rounds: int
    remembered: int
    rings: int
    tally: Tally
    roles: tuple[Role, ...]

    @property
    def outcomes(self) -> Counter[str]:
        """How many episodes ended how."""
        return Counter(episode.outcome for episode in self.episodes)


class SelfPlay:
    """Plays step after step. Holds the memory and the place in the corpus; both go into `state()`.

    `on_episode` is told of every episode the moment that it is finished, in order of arrival.
    """

    def __init__(
        self,
        settings: config.SelfPlayConfig,
        *,
        prompts: Prompts,
        codec: Codec,
        generator: Generator,
        clusters: Clusters,
        seed: int,
        max_model_len: int,
        judge: Judge | None = None,
        on_episode: Callable[[Episode], None] = lambda episode: None,
    ) -> None:
        self.roles = roles_of(settings)
        _check_lengths(self.roles, settings.sampling, max_model_len)
        self.memory = Memory(settings.memory, settings.memory_questions, settings.memory_steps)
        self._settings, self._clusters, self._seed, self._on_episode = settings, clusters, seed, on_episode
        self._baselines = Baselines() if settings.beyond.questioner_baseline == "ema" else None
        self._count = codec.count
        self._leftovers: dict[int, Leftover] = {}
        self._newest = 0  # weights that a finished rollout was made by: later requests get no older ones
        self._writer = Writer(
            settings,
            roles=self.roles,
            prompts=prompts,
            codec=codec,
            generator=generator,
            seed=seed,
            max_model_len=max_model_len,
            judge=judge,
        )

    async def play(self, step: int, finished: Iterable[Episode] = ()) -> Play:
        """Fill one batch. Episodes in `finished` (of an interrupted run of this step) are not run again.

        Raises StarvedError where `max_rounds` rounds do not keep enough questions; what they taught
        the memory stays. Any other error leaves the state somewhere inside the step: restore it.
        """
        oldest = self._oldest(step)
        known = {
            (episode.round, episode.index): episode
            for episode in finished
            if episode.step == step and min(episode.versions, default=oldest) >= oldest
        }
        episodes: list[Episode] = []
        wanted, tally = self._settings.questions, Tally()
        for number in range(self._settings.max_rounds):
            played = await self._round(step, number, wanted, known, tally)
            episodes += played
            wanted -= sum(episode.kept for episode in played)
            self._remember(step, played)
            if wanted <= 0:
                draw = random_of(self._seed, step, "batch")
                batch = compose(episodes, self._settings, draw, self._baselines, self.roles)
                memory = self.memory
                return Play(
                    step, tuple(episodes), batch, number + 1, len(memory), memory.rings, tally, self.roles
                )
        raise StarvedError(_starvation(step, episodes, self._settings), episodes)

    def state(self) -> dict[str, Any]:
        """What the next step depends on besides the weights, as JSON. To be taken between steps.

        Leftovers are in it as their places in the corpus: restored, they are asked for again.
        """
        state = {"memory": self.memory.state(), "clusters": self._clusters.state()}
        return state | ({"baselines": self._baselines.state()} if self._baselines else {})

    def restore(self, state: dict[str, Any]) -> None:
        try:
            memory, clusters = state["memory"], state["clusters"]
        except (KeyError, TypeError):
            raise SpellError("this is not a state of self-play; resume from another checkpoint") from None
        self.memory.restore(memory)
        self._clusters.restore(clusters)
        if self._baselines:
            self._baselines.restore(state.get("baselines", {}))
        self._leftovers = {}

    async def _round(
        self, step: int, number: int, wanted: int, known: dict[tuple[int, int], Episode], tally: Tally
    ) -> list[Episode]:
        """Episodes of one round: all, or up to the one that fills the batch."""
        drawn: list[tuple[Cluster, str | Question]] = []
        places = [self._clusters.state()]  # to go back to: drawing again would tokenise again
        for _ in range(self._settings.round_questions):
            drawn += self._clusters.draw(1)
            places.append(self._clusters.state())
        jobs = [self._job(step, number, index, *entry) for index, entry in enumerate(drawn)]
        played = Round([_known(job, known) for job in jobs], wanted, self._settings.whole_rounds)
        tally.journaled += sum(episode is not None for episode in played.done)
        try:
            for index, left in (await self._brought(step, played.done, tally)).items():
                if isinstance(left.work, Episode):
                    played.done[index] = self._arrived(left.work, jobs[index])
                else:
                    played.take(index, left)
            waiting = played.waiting()
            while not played.advance():
                for index in islice(waiting, max(0, self._settings.concurrency - played.running)):
                    played.begin(index, play_episode(self.roles, self._writer, jobs[index]), self._newest)
                    tally.begun += 1
                for index, episode in await played.arrivals():
                    played.done[index] = self._arrived(episode, jobs[index])
        except BaseException:
            await played.cancel()
            raise
        tally.used += played.end
        if played.is_full:
            await self._leave(*played.leftovers(), tally)
        if played.end < len(jobs):
            self._clusters.restore(places[played.end])
        return [episode for episode in played.done[: played.end] if episode is not None]

    async def _brought(self, step: int, done: Sequence[Episode | None], tally: Tally) -> dict[int, Leftover]:
        """What the step before left over, by its place in this one; without what is too old for it."""
        brought, self._leftovers = self._leftovers, {}
        fresh = {
            index: left
            for index, left in brought.items()
            if left.oldest >= self._oldest(step) and done[index] is None
        }
        await cancel(left.work for index, left in brought.items() if index not in fresh)
        tally.brought += len(brought)
        tally.expired += len(brought) - len(fresh)
        return fresh

    async def _leave(
        self, finished: dict[int, Episode], under_way: dict[int, Leftover], tally: Tally
    ) -> None:
        """Drop what the step did not need, or keep it for the next, by its place in that."""
        if self._settings.leftovers == "abort":
            await cancel(left.work for left in under_way.values())
            tally.aborted += len(under_way)
            tally.unused += len(finished)
            return
        ready = {
            i: Leftover(episode, min(episode.versions, default=self._newest))
            for i, episode in finished.items()
        }
        self._leftovers = dict(sorted({**ready, **under_way}.items()))
        tally.carried += len(self._leftovers)

    def _arrived(self, episode: Episode, job: Job) -> Episode:
        """Tell of an episode that is finished, in its place; one that was carried over keeps its origin."""
        if episode.step != job.step:
            origin = episode.step if episode.begun is None else episode.begun
            episode = replace(episode, step=job.step, round=job.round, index=job.index, begun=origin)
        self._newest = max(self._newest, *episode.versions, 0)
        self._on_episode(episode)
        return episode

    def _oldest(self, step: int) -> int:
        """The oldest weights whose rollouts a step may use. Weights bear the number of the step that made them."""
        return step - 1 - self._settings.max_staleness

    def _job(self, step: int, number: int, index: int, cluster: Cluster, what: str | Question) -> Job:
        cluster = staged(cluster, tokens_at(step, self._settings.beyond.stages), self._count)
        if isinstance(what, Question):
            return Job(step, number, index, cluster, what.task, question=what)
        task = TASKS.find(what, "corpus.sources.tasks").name
        return Job(step, number, index, cluster, task, self.memory.recall(task, cluster.id))

    def _remember(self, step: int, episodes: Iterable[Episode]) -> None:
        """Store the questions that were answered with some reward, in their own order."""
        for episode in episodes:
            question, answered = episode.question, episode.asked and episode.answered
            if episode.outcome == OUTVOTED:
                continue  # a question that is told again has to be right
            if question and answered and self._memorable(episode.mean_reward):
                documents = remembered_documents(
                    episode.documents, episode.history, self._settings.memory_form
                )
                self.memory.store(episode.task, episode.cluster, documents, question, step)

    def _memorable(self, reward: float) -> bool:
        low, high = self._settings.memory_range
        return low <= reward <= high and (self._settings.memory_form == "release" or 0 < reward < 1)


def _known(job: Job, known: dict[tuple[int, int], Episode]) -> Episode | None:
    """The finished episode of just this job, if there is one. What was carried over had another history."""
    episode = known.get((job.round, job.index))
    if episode is None or (episode.cluster, episode.task) != (job.cluster.id, job.task):
        return None
    return episode if episode.begun is not None or episode.history == job.history else None


def _check_lengths(roles: Sequence[Role], sampling: config.SamplingConfig, max_model_len: int) -> None:
    for role in roles:
        tokens = role.tokens(sampling)
        if tokens >= max_model_len:
            raise SpellError(
                f"selfplay.sampling.{role.tokens_key(sampling)}={tokens} leaves no room for a prompt in"
                f" rollout.max_model_len={max_model_len}: lower the first or raise the second"
            )


_REMEDIES = {
    "bad_format": ["model.prompts (short wording for small models)", "selfplay.sampling.temperature (lower)"],
    "bad_ground": [
        "selfplay.grounding (false keeps them)",
        "corpus.sources (texts that nobody knows by heart)",
    ],
    "zero_variance": ["selfplay.sampling.temperature (higher)", "selfplay.group_size (higher)"],
    "dropped:over_long": ["selfplay.sampling.questioner_tokens (higher)", "rollout.max_model_len (higher)"],
    "dropped:long_reference": ["selfplay.max_reference_tokens (higher)", "corpus.sources (tasks)"],
    "dropped:not_a_number": ["corpus.sources (no docmath_qa where texts have no figures)"],
    "dropped:unreachable_reference": ["model.prompts (references in words)", "corpus.sources (tasks)"],
    "dropped:unanswerable": ["selfplay.beyond.answerability (fewer distractors)"],
    "unnoted": ["selfplay.beyond.noted (off for a questioner that does not reason first)"],
    "unquoted": ["selfplay.beyond.quoted (off for a questioner that does not quote)"],
    "dropped:unjudged": ["selfplay.external_judge (does it answer? the log says how it fails)"],
    "dropped:prompt_too_long": ["rollout.max_model_len (higher)", "corpus.cluster_tokens (lower)"],
}
_LAST_RESORT = [
    "selfplay.max_rounds (higher)",
    "selfplay.questions (lower)",
    "selfplay.round_questions (higher)",
]


def _starvation(step: int, episodes: Sequence[Episode], settings: config.SelfPlayConfig) -> str:
    """Why the step starved: the counts, and the three keys that would help most."""
    outcomes = Counter(episode.outcome for episode in episodes)
    kept = outcomes.pop("kept", 0)
    counts = ", ".join(
        f"{count} {outcome.removeprefix('dropped:')}" for outcome, count in outcomes.most_common()
    )
    wanted = [_REMEDIES[outcome] for outcome, _ in outcomes.most_common() if outcome in _REMEDIES]
    keys = [*(remedies[0] for remedies in wanted[:2]), *(wanted[0][1:] if wanted else []), *_LAST_RESORT]
    return (
        f"step {step} could not fill its batch: {kept} of {settings.questions} questions kept after"
        f" {settings.max_rounds} rounds of {settings.round_questions} ({counts or 'nothing else'})."
        f" Keys most likely to help: {'; '.join(dict.fromkeys(keys[:3]))}"
    )
