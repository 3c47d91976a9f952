"""`memlaw audit`: what it takes, what it runs, what it shows."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated

from rich.text import Text
from tyro.conf import Positional, arg

from memlaw.cli.dispatch import DONE, NOT_CERTIFIED
from memlaw.cli.parse import parse, part_of
from memlaw.cli.terminal import print_json, print_rows, quiet_libraries, stdout_console
from memlaw.core.errors import ConfigError
from memlaw.settings.audit import AuditConfig
from memlaw.settings.endpoint import EndpointConfig

if TYPE_CHECKING:
    from memlaw.certify.check import CertificateCheck
    from memlaw.measure.examine import Audit
    from memlaw.measure.harm import Harm

GROUPS = {
    "data": ("prompt_field", "completion_field"),
    "model": ("adapter", "model", "device"),
    "server": ("endpoint", "name"),
    "measurement": ("certificate", "survival", "specificity", "decode"),
    "run": ("tokens", "json", "config"),
}


@dataclass(frozen=True, kw_only=True)
class AuditArguments(AuditConfig, EndpointConfig):
    """Measure, token by token, what an adapter or a bare model recalls.

    Attributes:
        data: the records: JSONL, JSON, CSV, TSV, Parquet, Arrow, a folder of datasets, or plain
            text.
        certificate: measure again what this certificate.json says of the adapter in its folder.
        survival: audit the adapter in every form in which people run it: dtypes, merged, GGUF,
            quantised base models, batches, padding, attention.
        forms: the forms of --survival, as merged-bf16,batch-1 (default: all).
        json: print JSON: totals, records, tokens.
        tokens: also write the token table to this Parquet file.
        config: TOML file with options by these names; options on the command line win.
    """

    data: Annotated[Positional[Path], arg(metavar="DATA")]
    certificate: Path | None = None
    survival: bool = False
    forms: tuple[str, ...] = ()
    json: bool = False
    tokens: Path | None = None
    config: Path | None = None

    def __post_init__(self) -> None:
        """Raise ConfigError on a setting out of range."""
        AuditConfig.__post_init__(self)
        EndpointConfig.__post_init__(self)
        if self.forms and not self.survival:
            raise ConfigError("--forms are those of --survival: give both.")
        others = ("certificate", "endpoint", "tokens", "specificity")
        if self.survival and (given := [name for name in others if getattr(self, name)]):
            raise ConfigError(f"--survival is a table of its own: leave out --{given[0]}.")


def run(args: list[str]) -> int:
    """Run the command; returns the exit status."""
    given = parse(AuditArguments, GROUPS, "audit", args)
    if given.endpoint is not None:
        from memlaw.cli.served import run_served

        return run_served(
            given.data,
            part_of(EndpointConfig, given),
            part_of(AuditConfig, given),
            given.certificate,
            given.json,
        )
    quiet_libraries()
    if given.survival:
        from memlaw.cli.survival import run_survival

        return run_survival(given.data, part_of(AuditConfig, given), given.forms, given.json)
    from memlaw.certify.check import check_certificate
    from memlaw.cli.progress import ConsoleObserver
    from memlaw.measure.session import audit, audit_and_harms
    from memlaw.measure.specificity import specificity
    from memlaw.shards.layout import is_sharded

    if given.tokens is not None and not given.tokens.absolute().parent.is_dir():
        raise ConfigError(f"--tokens {given.tokens}: its folder does not exist. Create it first.")
    config = part_of(AuditConfig, given)
    if given.certificate is not None and is_sharded(given.certificate.parent):
        from memlaw.cli.shards import run_check

        return run_check(given, config)
    with closing(ConsoleObserver()) as observer:
        if given.certificate is not None:
            check = check_certificate(given.certificate, given.data, config, observer=observer)
            found, harms = check.audit, check.harms
        elif config.specificity:
            check = None
            found, harms = audit_and_harms(given.data, config, observer=observer)
        else:
            check, harms = None, {}
            found = audit(given.data, config, observer=observer)
    if given.tokens is not None:
        found.write_tokens(given.tokens)
    if given.json:
        content = found.with_texts().to_json()
        if check is not None:
            content |= {
                "holds": check.holds,
                "mismatches": list(check.mismatches),
                "unchecked": list(check.unchecked),
            }
        if harms:
            verdict = specificity(harms)
            content["harms"] = {name: harm.to_json() for name, harm in harms.items()}
            content["specific"] = verdict and verdict.specific
            content["not_specific_because"] = list(verdict.reasons) if verdict else []
        print_json(content)
    elif check is not None:
        show_check(check)
    else:
        show_audit(found, harms)
    passed = found.passed if check is None else check.holds
    return DONE if passed else NOT_CERTIFIED


def show_audit(audit: Audit, harms: Mapping[str, Harm] = MappingProxyType({})) -> None:
    """The table of an audit, and of what else an adapter changes where that was measured."""
    from memlaw.cli.verdicts import SHOWN, audit_rows, print_failures, print_specificity
    from memlaw.measure.specificity import specificity

    console = stdout_console()
    print_rows(
        console,
        audit_rows(audit)
        | {"NLL": f"{audit.nll_nats:.4f} nats per token", "computed in": audit.dtype}
        | dict(harm.row() for harm in harms.values()),
    )
    print_failures(console, audit)
    if audit.disagreements:
        console.print(
            "The teacher-forced pass and greedy decoding disagree on "
            f"{len(audit.disagreements)} record(s): there rounding decides, and another machine "
            "may give another result:"
        )
        for verdict in audit.disagreements[:SHOWN]:
            said = "right" if verdict.argmax_recalled else "wrong"
            other = "wrong" if verdict.argmax_recalled else "right"
            console.print(Text(f"  {verdict.id}: teacher-forced {said}, decoding {other}"))
    if audit.unsure:
        console.print(
            "Rounded otherwise, in other batches or on another machine, some records that are "
            "recited here may not be. The chance of that:"
        )
        risks = {audit.records[n].id: audit.records[n].flip_risk or 0.0 for n in audit.unsure}
        for id, risk in sorted(risks.items(), key=lambda item: -item[1])[:SHOWN]:
            console.print(Text(f"  {id}: {risk:.1%}"))
    print_specificity(console, specificity(harms))


def show_check(check: CertificateCheck) -> None:
    """The result of `--certificate`: the audit, what doesn't match, and whether it holds."""
    from memlaw.cli.verdicts import SHOWN, certificate_verdict, print_specificity
    from memlaw.measure.harm import KINDS
    from memlaw.measure.specificity import specificity

    claims = check.certificate.claims()
    unclaimed = {name: harm for name, harm in check.harms.items() if name not in claims}
    show_audit(check.audit)
    console = stdout_console()
    for name, claim in claims.items():
        claimed = KINDS[name].read(claim)
        if name in check.harms:
            row = check.harms[name].row_beside(claimed)
        else:
            row = (claimed.row()[0], "not measured again: the certificate's text isn't here")
        print_rows(console, dict([row]))
    if unclaimed:
        print_rows(console, dict(harm.row() for harm in unclaimed.values()))
    print_specificity(console, specificity(check.harms))
    for line in check.mismatches[: 4 * SHOWN]:
        console.print(Text(f"  {line}"), soft_wrap=True)
    if len(check.mismatches) > 4 * SHOWN:
        console.print(f"  and {len(check.mismatches) - 4 * SHOWN} more")
    for line in check.unchecked:
        console.print(Text(f"  not checked: {line}"), soft_wrap=True)
    console.print(Text(certificate_verdict(check), style="bold"))
