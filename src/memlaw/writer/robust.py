"""`robust_to`: what is trained, audited in other forms than the one of the certificate."""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path

from memlaw.core.errors import ConfigError
from memlaw.export.forms import Bench
from memlaw.measure.examine import Audit
from memlaw.model.formats import save_adapter
from memlaw.writer.state import Run


class Robust:
    """The forms that a run is to be certified in besides the plain one.

    A form in which some record fails is a reason to train on with a higher aim, as a failed audit
    is: p that is further above the line stands more rounding.

    Args:
        run: what is trained.

    Raises:
        ConfigError: a form can't be tried here, so that all training would be in vain.
    """

    def __init__(self, run: Run) -> None:
        self.run, self.forms = run, run.config.forms
        self.bench = Bench(run.base, trust_remote_code=run.config.trust_remote_code)
        lacking = importlib.util.find_spec("bitsandbytes") is None
        if lacking and (found := [form.name for form in self.forms if form.base]):
            raise ConfigError(
                f"robust_to names {found[0]}, but bitsandbytes is not installed. Run "
                "pip install '.[quant]', or leave it out."
            )

    def audits(self) -> dict[str, Audit]:
        """The audit of the weights as they are in each form, saved and loaded, by its name."""
        found: dict[str, Audit] = {}
        if not self.forms:
            return found
        run, config, base = self.run, self.run.config, self.run.base
        with tempfile.TemporaryDirectory(prefix="memlaw-") as name:
            folder = Path(name)
            save_adapter(run.learner.adapter, folder, base_path=base.name, base_sha256=base.sha256)
            for form in self.forms:
                found[form.name] = self.bench.audit(
                    folder,
                    form,
                    run.examples,
                    threshold=config.threshold,
                    margin=config.margin,
                    batch_size=config.audit_batch_size,
                    progress=run.observer.progress,
                )
        return found
