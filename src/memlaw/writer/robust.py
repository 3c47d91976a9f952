"""`robust_to`: what is trained, audited in other forms than the one of the certificate."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from memlaw.core.errors import ConfigError, MemlawError
from memlaw.data.record import Example
from memlaw.export.forms import Bench
from memlaw.measure.examine import Audit
from memlaw.model.formats import save_adapter
from memlaw.settings.forms import Form
from memlaw.writer.state import Run


class Robust:
    """The forms that a run is to be certified in besides the plain one.

    A form in which some record fails is a reason to train on with a higher aim, as a failed audit
    is: p that is further above the line stands more rounding.

    Args:
        run: what is trained.

    Raises:
        ConfigError: a form can't be tried here (the shortest record is), so that all training
            would be in vain.
    """

    def __init__(self, run: Run) -> None:
        self.run, self.forms = run, run.config.forms
        self.bench = Bench(run.base, trust_remote_code=run.config.trust_remote_code)
        if not self.forms:
            return
        shortest = min(run.examples, key=lambda e: len(e.prompt_ids) + len(e.target_ids))
        with self._saved() as folder:
            for form in self.forms:
                try:
                    self._audit(folder, form, [shortest])
                except MemlawError as error:
                    raise ConfigError(
                        f"robust_to names {form.name}, which can't be tried here: {error} Or "
                        "leave the form out."
                    ) from error

    def audits(self) -> dict[str, Audit]:
        """The audit of the weights as they are in each form, saved and loaded, by its name."""
        if not self.forms:
            return {}
        with self._saved() as folder:
            return {form.name: self._audit(folder, form, self.run.examples) for form in self.forms}

    @contextmanager
    def _saved(self) -> Iterator[Path]:
        run = self.run
        with tempfile.TemporaryDirectory(prefix="memlaw-") as name:
            folder, (path, sha256) = Path(name), (run.base.name, run.base.sha256)
            save_adapter(run.learner.adapter, folder, base_path=path, base_sha256=sha256)
            yield folder

    def _audit(self, folder: Path, form: Form, examples: Sequence[Example]) -> Audit:
        config = self.run.config
        return self.bench.audit(
            folder,
            form,
            examples,
            threshold=config.threshold,
            margin=config.margin,
            batch_size=config.audit_batch_size,
            progress=self.run.observer.progress,
        )
