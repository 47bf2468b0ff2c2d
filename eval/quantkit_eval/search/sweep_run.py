"""A sweep from its options to its results: plan, run what has no row yet, keep models, write tables and the plot."""

import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.checkpoint.output_folder import file_hash
from quantkit.paths import user_path
from quantkit.planner.this_machine import Machine, measure
from quantkit.progress import Progress
from quantkit_eval.folders import bos_token, load_tokenizer
from quantkit_eval.perplexity import cut
from quantkit_eval.search.front import best, pareto, write_plot
from quantkit_eval.search.grid import Combination, Impossible, combine, label
from quantkit_eval.search.identity import model_hash, recipe_hash, row_name
from quantkit_eval.search.options import Begun, none_possible
from quantkit_eval.search.planned import Planned, check_room, plan_run
from quantkit_eval.search.results import Entry, Row, read_row, record, write_results
from quantkit_eval.search.run_worker import Job
from quantkit_eval.search.runs import Pool, Processes, fitting, run_all
from quantkit_eval.texts import read_text

LOG = logging.getLogger("quantkit.sweep")
PLOT = "front.svg"


@dataclass(frozen=True, slots=True)
class SweepResult:
    """What a sweep found. entries: a run each; impossible: combinations without one; folded: those left out as equal.

    best  the entry that --keep best keeps; None without rows. remarks: what is worth knowing, a line each
    """

    model: str
    output: Path
    entries: tuple[Entry, ...]
    impossible: tuple[Impossible, ...]
    folded: int
    best: Entry | None
    remarks: tuple[str, ...] = ()

    @property
    def front(self) -> list[Entry]:
        """The Pareto front, smallest first."""
        found = [
            (entry.row.size_bytes, entry.row.kl.value, entry) for entry in self.entries if entry.row and entry.front
        ]
        return [entry for _, _, entry in sorted(found, key=lambda one: one[:2])]

    @property
    def failed(self) -> list[Entry]:
        """Runs without a row."""
        return [entry for entry in self.entries if entry.error is not None]

    def to_json(self) -> dict[str, Any]:
        """What `quantkit sweep --json` prints."""
        return {
            "model": self.model,
            "output": str(self.output),
            "rows": [record(entry) for entry in self.entries],
            "impossible": [{"settings": dict(one.settings), "reason": one.reason} for one in self.impossible],
            "folded": self.folded,
            "front": [entry.row.name for entry in self.front if entry.row],
            "best": self.best.row.name if self.best and self.best.row else None,
            "remarks": list(self.remarks),
        }


def sweep(begun: Begun) -> SweepResult:
    """Run a grid or a search whose options were checked; what has a row in the output folder is not run again.

    UserError for bad input, before anything is made; a run that fails is an entry with its error, not an exception.
    """
    return _Sweep(begun).run()


class _Sweep:
    """One sweep as it goes on."""

    def __init__(self, begun: Begun) -> None:
        self.options, self.begun, self.place = begun.options, begun, begun.place
        parent = self.place.path.absolute()
        while not parent.exists():
            parent = parent.parent
        self.machine: Machine = measure(parent)
        text = read_text(self.options.text)
        tokenizer, _ = load_tokenizer(begun.folder, self.options.trust_remote_code)
        first = bos_token(tokenizer, "auto", begun.model)
        cut(text, tokenizer, self.options.context, self.options.tokens, bos=first)  # UserError where it is too short
        self.text_hash = text.sha256
        if self.options.tasks:
            from quantkit_eval.tasks.selection import check_names

            check_names(self.options.tasks, None)  # UserError for one that does not exist
        files = {name: file_hash(user_path(name)) for name in self.options.tasks if user_path(name).is_file()}
        self.tasks = [[name, files.get(name)] for name in self.options.tasks]
        self.model_hash = model_hash(begun.folder)
        self.plans: dict[str, Planned | Impossible] = {}
        self.errors: dict[str, str] = {}
        self.remarks: list[str] = []

    def run(self) -> SweepResult:
        """See `sweep`."""
        o, found = self.options, self.begun.checked
        impossible: list[Impossible] = []
        runs: list[Planned] = []
        if found is not None:
            LOG.info("planning %d combinations", len(found.combinations))
            planned = [self._plan(one) for one in found.combinations]
            impossible = [*found.impossible, *(one for one in planned if isinstance(one, Impossible))]
            runs = [one for one in planned if isinstance(one, Planned)]
            if not runs:
                raise none_possible(impossible)
            _say(len(runs), impossible, found.folded)
        jobs = {job.name: (job, one) for one in runs for job in [self._job(one)]}
        missing = [one for job, one in jobs.values() if not self._done(job)]
        if found is None and isinstance(base := self._planned({}), Planned):  # a search: each run about as the base
            missing = [base] * (o.search or 1)
        slots = fitting(o.jobs or 1, [one.peak_bytes for one in missing], self.machine.free_memory)
        if slots < min(o.jobs or 1, len(missing)):
            LOG.info("memory is enough for %d of %d runs at a time", slots, o.jobs)
        check_room(missing, o.keep, slots, self.place.path, self.machine.free_disk)
        pool = self._pool(slots)
        self.place.begin(self.begun.model, self.model_hash, "grid" if found is not None else "search")
        try:
            with pool:
                if found is None:
                    settings, impossible = self._search(pool)
                else:
                    settings = {job.name: one.combination.settings for job, one in jobs.values()}
                    self._run([job for job, _ in jobs.values() if not self._done(job)], settings, pool)
                return self._finish(settings, impossible, 0 if found is None else found.folded, pool)
        finally:
            self.place.end()

    def _plan(self, combination: Combination) -> Planned | Impossible:
        key = combination.label
        if key not in self.plans:
            self.plans[key] = plan_run(combination, self.begun.folder, self.machine, self.options.trust_remote_code)
        return self.plans[key]

    def _planned(self, settings: Mapping[str, str]) -> Planned | Impossible:
        found = combine(self.options.recipe, self.begun.model, settings)
        return self._plan(found) if isinstance(found, Combination) else found

    def _job(self, planned: Planned) -> Job:
        o, combination = self.options, planned.combination
        recipe = combination.recipe.model_copy(update={"model": self.begun.model})
        hashes = (self.model_hash, recipe_hash(recipe), self.text_hash)
        depends = {"context": o.context, "tokens": o.tokens, "tasks": self.tasks, "limit": o.limit, "device": o.device}
        name = row_name(*hashes, depends)
        return Job(
            name=name, label=combination.label, recipe=recipe.resolved(), hashes=hashes, text=o.text, context=o.context,
            tokens=o.tokens, tasks=o.tasks, limit=o.limit, device=o.device, trust_remote_code=o.trust_remote_code,
            folder=str((self.place.work / name).absolute()), row=str(self.place.row(name).absolute()), cwd=os.getcwd(),
            peak_bytes=planned.peak_bytes,
        )  # fmt: skip

    def _done(self, job: Job) -> bool:
        """Whether a job has its row and, where all models are kept, its model."""
        there = self.options.keep != "all" or self.place.made(job.name, job.label) is not None
        return there and read_row(self.place.row(job.name)) is not None

    def _pool(self, slots: int) -> Pool:
        if self.options.ray is None:
            return Processes(slots)
        from quantkit_eval.search.ray_runs import RayTasks

        return RayTasks(self.options.ray, self.options.jobs)

    def _run(self, jobs: list[Job], settings: Mapping[str, Mapping[str, str]], pool: Pool) -> None:
        """Run jobs, and rewrite the results after each."""
        if not jobs:
            return
        with Progress(self.options.progress, unit="run") as bar:
            bar.begin(len(settings), len(settings) - len(jobs))
            bar.start_blocks()
            for job, error in run_all(_noted(iter(jobs), bar), pool):
                self._ended(job, error, settings)
                bar.advance()

    def _search(self, pool: Pool) -> tuple[Mapping[str, Mapping[str, str]], list[Impossible]]:
        from quantkit_eval.search.optuna_search import Search

        o = self.options
        assert o.search is not None
        base = combine(o.recipe, self.begun.model, {})
        identity = [self.model_hash, self.text_hash, o.context, o.tokens, self.tasks, o.limit, o.device]
        identity.append(recipe_hash(base.recipe) if isinstance(base, Combination) else base.reason)
        search = Search(
            self.place.path, self.begun.grid, o.search, o.seed, identity, self._job_of,
            lambda name: read_row(self.place.row(name)),
        )  # fmt: skip
        with Progress(o.progress, unit="run") as bar:
            bar.begin(o.search)
            bar.start_blocks()
            for job, error in run_all(_noted(search.jobs(), bar), pool):
                search.tell(job, read_row(self.place.row(job.name)) if error is None else None)
                self._ended(job, error, search.settings)
                bar.advance()
        if len(search.settings) < o.search:
            self.remarks.append(f"the search found {len(search.settings)} different runs; {o.search} were asked for")
        return search.settings, search.impossible

    def _job_of(self, settings: Mapping[str, str]) -> Job | Impossible:
        planned = self._planned(settings)
        return self._job(planned) if isinstance(planned, Planned) else planned

    def _ended(self, job: Job, error: str | None, settings: Mapping[str, Mapping[str, str]]) -> None:
        """Note a failed run, forget the models that are kept no longer, write the results so far."""
        row = read_row(self.place.row(job.name)) if error is None else None
        if row is None:
            self.errors[job.name] = error or "it wrote no row"
            LOG.warning("%s failed: %s", job.label, self.errors[job.name])
        else:
            LOG.info("%s: %.3f bits, KL %.3g", job.label, row.bits_per_weight, row.kl.value)
        entries = self._entries(settings)
        front = {entry.row.name for entry in entries if entry.row and entry.front}
        if self.options.keep != "all":
            kept = front if self.options.keep != "none" else set()
            self.place.drop(entry.row.name for entry in entries if entry.row and entry.row.name not in kept)
        write_results(self.place.path, [entry for entry in entries if entry.row or entry.error])

    def _entries(self, settings: Mapping[str, Mapping[str, str]]) -> list[Entry]:
        """An entry of each run, in the order of the settings, as things are now."""
        rows = {name: read_row(self.place.row(name)) for name in settings if name not in self.errors}
        points = [row.point(label(settings[name])) for name, row in rows.items() if row is not None]
        front = {point.name for point in pareto(points)}
        found = []
        for name, given in settings.items():
            kept = self.place.kept(name, label(given))
            folder = str(kept.relative_to(self.place.path)) if kept.is_dir() else None
            found.append(Entry(given, label(given), rows.get(name), self.errors.get(name), name in front, folder))
        return found

    def _finish(
        self, settings: Mapping[str, Mapping[str, str]], impossible: list[Impossible], folded: int, pool: Pool
    ) -> SweepResult:
        """Keep models, write results and the plot."""
        entries = self._entries(settings)
        rows: list[tuple[Entry, Row]] = [(entry, entry.row) for entry in entries if entry.row is not None]
        points = [row.point(entry.label) for entry, row in rows]
        chosen = best(points)
        wanted = {
            "none": set(), "all": {row.name for _, row in rows}, "best": {chosen.name} if chosen else set(),
            "pareto": {point.name for point in pareto(points)},
        }[self.options.keep]  # fmt: skip
        lacking = [name for name in wanted if self.place.made(name, label(settings[name])) is None]
        if lacking:  # rows of an earlier sweep that kept fewer models: they are made again
            again = [job for name in lacking if isinstance(job := self._job_of(settings[name]), Job)]
            self._run(again, {name: settings[name] for name in lacking}, pool)
        for name in wanted - set(self.errors):
            self.place.keep(name, label(settings[name]))
        self.place.clear(settings, finished=not self.errors)
        entries = self._entries(settings)
        write_results(self.place.path, entries)
        if (why := write_plot(points, self.place.path / PLOT, f"{self.begun.model}, {self.options.text}")) is not None:
            self.remarks.append(why)
        first = next((entry for entry in entries if chosen and entry.row and entry.row.name == chosen.name), None)
        return SweepResult(
            self.begun.model, self.place.path, tuple(entries), tuple(impossible), folded, first, tuple(self.remarks)
        )


def _noted(jobs: Iterator[Job], bar: Progress) -> Iterator[Job]:
    """The jobs, each shown as it begins."""
    for job in jobs:
        bar.note(job.label)
        yield job


def _say(runs: int, impossible: list[Impossible], folded: int) -> None:
    """List what a grid comes to, before any work."""
    parts = [f"{runs} runs"]
    parts += [f"{len(impossible)} impossible"] * bool(impossible) + [f"{folded} equal to others"] * bool(folded)
    LOG.info("the grid: %s", ", ".join(parts))
    for one in impossible:
        LOG.info("impossible: %s: %s", one.label, one.reason)
