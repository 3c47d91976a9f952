"""The command line: parse, call one function, print."""

from __future__ import annotations

import json
import os
import signal
import sys
import tomllib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from memlaw.core.errors import ConfigError, MemlawError

DONE, NOT_CERTIFIED, BAD_REQUEST, INTERRUPTED = 0, 1, 2, 130

HELP = """usage: memlaw COMMAND ...

Write records into a language model word for word, and prove it.

commands:
  write DATA -o OUT      train an adapter until every record is recited, and certify it
  audit DATA             measure, token by token, what an adapter or a model recalls
  audit DATA --certificate OUT/certificate.json
                         measure again what a certificate says
  ask OUT PROMPT         let an adapter recite
  report OUT -o FILE     show it all on one page, or as figures and tables
  probe -o RUNS          train a grid of ranks and lengths, and measure what each remembers
  fit RUNS               fit the laws of memory to a probe, with intervals
  plan [RUNS] --tokens N which rank for N tokens? (--rank R: how many tokens?)
  bench objectives -o RUNS
                         the same probe with each objective, compared pair by pair

DATA is JSONL, JSON, CSV, TSV or Parquet with the fields prompt and completion (or
messages), or a plain text file, which is one long record.

exit status: 0 certified, or done; 1 not certified, more damage than allowed, or a cell
failed; 2 bad request; 130 interrupted
'memlaw COMMAND --help' explains a command; 'memlaw --version' prints the version.
"""


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its status."""
    sys.exit(run(list(sys.argv[1:] if args is None else args)))


def run(args: list[str]) -> int:
    """Run the command line; returns the exit status."""
    # Large pages for PyTorch's tensors: on long records, first touches of small ones cost a
    # fifth of a step.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    try:
        status = _dispatch(args)
        sys.stdout.flush()
        return status
    except MemlawError as error:
        print(f"memlaw: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("memlaw: interrupted.", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE


def _dispatch(args: list[str]) -> int:
    commands: dict[str, Callable[[list[str]], int]] = {
        "write": _write,
        "audit": _audit,
        "ask": _ask,
        "probe": _probe,
        "fit": _fit,
        "plan": _plan,
        "report": _report,
        "bench": _bench,
    }
    if not args or args[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return DONE if args else BAD_REQUEST
    if args[0] == "--version":
        from memlaw import __version__

        print(f"memlaw {__version__}")
        return DONE
    if args[0] not in commands:
        print(
            f"memlaw: no command '{args[0]}'. There are {', '.join(commands)}; see "
            "'memlaw --help'.",
            file=sys.stderr,
        )
        return BAD_REQUEST
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    return commands[args[0]](args[1:])


def _quiet() -> None:
    """Let only this program speak: no progress bars and warnings of the libraries beneath it."""
    warnings.filterwarnings("ignore")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _parse(kind: type, command: str, args: list[str]) -> Any:
    import tyro

    return tyro.cli(kind, prog=f"memlaw {command}", args=_with_config_file(kind, args))


def _with_config_file(kind: type, args: list[str]) -> list[str]:
    """Put the settings of `--config FILE.toml` before the others, which so have the last word."""
    args = [part for arg in args for part in _apart(arg)]
    if "--config" not in args:
        return args
    if args.count("--config") > 1:
        raise ConfigError("--config is given twice. Put all settings in one file.")
    place = args.index("--config")
    if place + 1 == len(args):
        raise ConfigError("--config needs a TOML file.")
    path = Path(args[place + 1])
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: can't be read ({error.strerror}).") from error
    except ValueError as error:
        raise ConfigError(f"{path}: not TOML ({error}).") from error
    known = {f.name for f in fields(kind)} - {"data", "paths", "config"}
    settings: list[str] = []
    for key, value in content.items():
        name = key.replace("-", "_")
        if name not in known:
            raise ConfigError(f"{path}: unknown key '{key}'. There are {', '.join(sorted(known))}.")
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            settings.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            items = value if isinstance(value, list) else [value]
            settings += [f"--{flag}", *map(str, items)]
    rest = args[:place] + args[place + 2 :]
    # DATA goes first: behind a setting that takes a list it would be read as one of its items.
    first = 1 if rest and not rest[0].startswith("-") else 0
    return rest[:first] + settings + rest[first:]


def _apart(arg: str) -> list[str]:
    """`--config=FILE` as the two arguments it stands for; others as they are."""
    return ["--config", arg.removeprefix("--config=")] if arg.startswith("--config=") else [arg]


def _write(args: list[str]) -> int:
    from memlaw.cli.arguments import WriteArguments

    given = _parse(WriteArguments, "write", args)
    _quiet()
    from memlaw.cli.console import ConsoleObserver, show_write
    from memlaw.settings.write import WriteConfig
    from memlaw.writer.folder import CHECKPOINT_FILE
    from memlaw.writer.run import write

    config = WriteConfig(**{f.name: getattr(given, f.name) for f in fields(WriteConfig)})
    observer = ConsoleObserver()
    try:
        result = write(given.data, given.out, config, observer=observer)
    except KeyboardInterrupt:
        if (given.out / CHECKPOINT_FILE).is_file():
            observer.notice(
                f"Interrupted. Go on by the same command with --resume: the state is "
                f"in {given.out}."
            )
        else:
            observer.notice("Interrupted before there was anything to keep.")
        return INTERRUPTED
    finally:
        observer.close()
    show_write(result)
    return DONE if result.certified and result.harmless else NOT_CERTIFIED


def _audit(args: list[str]) -> int:
    from memlaw.cli.arguments import AuditArguments

    given = _parse(AuditArguments, "audit", args)
    _quiet()
    from memlaw.certify.check import check_certificate
    from memlaw.cli.console import ConsoleObserver, audit_json, show_audit, show_check
    from memlaw.measure.session import audit
    from memlaw.settings.audit import AuditConfig

    if given.tokens is not None and not given.tokens.absolute().parent.is_dir():
        raise ConfigError(f"--tokens {given.tokens}: its folder does not exist. Make it first.")
    config = AuditConfig(**{f.name: getattr(given, f.name) for f in fields(AuditConfig)})
    observer = ConsoleObserver()
    try:
        if given.certificate is not None:
            check = check_certificate(given.certificate, given.data, config, observer=observer)
            found = check.audit
        else:
            check = None
            found = audit(given.data, config, observer=observer)
    finally:
        observer.close()
    if given.tokens is not None:
        found.write_tokens(given.tokens)
    if given.json:
        content = audit_json(found)
        if check is not None:
            content |= {"holds": check.holds, "mismatches": list(check.mismatches)}
        print(json.dumps(content, ensure_ascii=False, indent=2))
    elif check is not None:
        show_check(check)
    else:
        show_audit(found)
    passed = found.passed if check is None else check.holds
    return DONE if passed else NOT_CERTIFIED


def _probe(args: list[str]) -> int:
    from memlaw.cli.arguments import ProbeArguments

    given = _parse(ProbeArguments, "probe", _listed(args))
    _quiet()
    from memlaw.cli.console_probe import show_probe
    from memlaw.probe.run import probe

    result = _probed(given, lambda config, how: probe(given.out, config, **how))
    if result is None:
        return INTERRUPTED
    if given.json:
        print(json.dumps(result.cells, ensure_ascii=False, indent=2))
    else:
        show_probe(result, given.out)
    return NOT_CERTIFIED if result.n_failed else DONE


def _probed(given: Any, run: Callable[[Any, dict[str, Any]], Any]) -> Any:
    """What `run` makes of a probe's settings, and of launcher and observer; None if interrupted."""
    from memlaw.cli.console_probe import ConsoleProbeObserver
    from memlaw.settings.probe import ProbeConfig

    config = ProbeConfig(**{f.name: getattr(given, f.name) for f in fields(ProbeConfig)})
    launcher = None
    if given.launcher == "ray":
        from memlaw.probe.ray_launcher import ray_launcher

        launcher = ray_launcher(address=given.ray_address, cpus=given.ray_cpus, gpus=given.ray_gpus)
    observer = ConsoleProbeObserver()
    try:
        return run(config, {"launcher": launcher, "observer": observer})
    except KeyboardInterrupt:
        observer.notice("Interrupted. The same command goes on with the cells that are missing.")
        return None
    finally:
        observer.close()


def _bench(args: list[str]) -> int:
    if args[:1] not in (["objectives"], ["--help"], ["-h"]):
        what = f"no benchmark '{args[0]}'" if args else "bench needs a name"
        raise ConfigError(f"{what}. There is objectives: memlaw bench objectives -o RUNS.")
    from memlaw.cli.arguments import BenchObjectivesArguments

    given = _parse(BenchObjectivesArguments, "bench objectives", _listed(args[1:] or args))
    _quiet()
    from memlaw.cli.console_probe import show_comparison
    from memlaw.probe.bench import compare_objectives

    found = _probed(
        given,
        lambda config, how: compare_objectives(given.out, config, given.objectives, **how),
    )
    if found is None:
        return INTERRUPTED
    if given.json:
        print(json.dumps(found.to_json(), ensure_ascii=False, indent=2))
    else:
        show_comparison(found, given.out)
    return NOT_CERTIFIED if found.n_failed else DONE


def _fit(args: list[str]) -> int:
    from memlaw.cli.law_commands import FitArguments, show_fit

    given = _parse(FitArguments, "fit", args)
    from memlaw.data.tasks import parse_task
    from memlaw.law.fits import fit_store
    from memlaw.law.store import read_cells

    cells = read_cells(given.runs, _warn)
    task = parse_task(given.task).name if given.task else None
    fits = fit_store(cells, form=given.form, covariate=given.covariate, task=task)
    if given.json:
        print(json.dumps([fit.to_json() for fit in fits], ensure_ascii=False, indent=2))
    else:
        show_fit(fits)
    return DONE if any(fit.law is not None for fit in fits) else NOT_CERTIFIED


def _plan(args: list[str]) -> int:
    from memlaw.cli.law_commands import PlanArguments, show_plan

    given = _parse(PlanArguments, "plan", args)
    from memlaw.data.tasks import parse_task
    from memlaw.law.plan import BUILTIN, builtin_cells, plan_rank, plan_tokens
    from memlaw.law.recall_law import reached
    from memlaw.law.store import read_cells

    if (given.tokens is None) == (given.rank is None):
        raise ConfigError("plan needs either --tokens (which rank?) or --rank (how many tokens?).")
    cells = builtin_cells() if given.runs is None else read_cells(given.runs, _warn)
    where = _where(given.where) | ({"task": parse_task(given.task).name} if given.task else {})
    how: dict[str, Any] = {
        "recall": given.recall,
        "confidence": given.confidence,
        "where": where,
    }
    plan: Any = (
        plan_rank(cells, given.tokens, **how)
        if given.tokens is not None
        else plan_tokens(cells, given.rank, **how)
    )
    verified = []
    if given.verify:
        _quiet()
        from memlaw.cli.console_probe import ConsoleProbeObserver
        from memlaw.probe.verify import verify_plan

        observer = ConsoleProbeObserver()
        try:
            trained = verify_plan(cells, plan.rank, plan.n_tokens, where=where, observer=observer)
        finally:
            observer.close()
        succeeded = reached(trained, given.recall).tolist()
        verified = list(zip(trained, succeeded, strict=True))
    if given.json:
        rows = [row | {"succeeded": succeeded} for row, succeeded in verified]
        print(json.dumps(asdict(plan) | {"verified": rows}, ensure_ascii=False, indent=2))
    else:
        show_plan(plan, BUILTIN if given.runs is None else str(given.runs), verified)
    return NOT_CERTIFIED if verified and not verified[0][1] else DONE


def _where(conditions: Sequence[str]) -> dict[str, Any]:
    """`COLUMN=VALUE` as a column and what JSON, or else the text itself, says it is."""
    found = {}
    for condition in conditions:
        column, sign, value = condition.partition("=")
        if not sign:
            raise ConfigError(f"--where {condition}: write COLUMN=VALUE, as recipe=paper.")
        try:
            found[column] = json.loads(value)
        except ValueError:
            found[column] = value
    return found


def _warn(text: str) -> None:
    print(f"memlaw: {text}", file=sys.stderr)


def _listed(args: list[str]) -> list[str]:
    """`--ranks 1,2,3` as `--ranks 1 2 3`, and likewise for the other lists of numbers."""
    lists = ("--ranks", "--lengths", "--seeds", "--layers")
    found: list[str] = []
    for arg in args:
        flag, _, values = arg.partition("=")
        if flag in lists and values:
            found += [flag, *values.split(",")]
        elif found and found[-1] in lists:
            found += arg.split(",")
        else:
            found.append(arg)
    return found


def _ask(args: list[str]) -> int:
    from memlaw.cli.arguments import AskArguments

    given = _parse(AskArguments, "ask", args)
    _quiet()
    from memlaw.measure.session import ask

    answer = ask(**asdict(given))
    sys.stdout.write(answer.text)
    if sys.stdout.isatty() and not answer.text.endswith("\n"):
        sys.stdout.write("\n")
    sys.stdout.flush()
    if not answer.finished:
        print(
            "memlaw: cut off before the model ended its turn; raise --max-tokens.", file=sys.stderr
        )
    return DONE if answer.finished else NOT_CERTIFIED


def _report(args: list[str]) -> int:
    from memlaw.cli.report_arguments import ReportArguments

    given = _parse(ReportArguments, "report", args)
    from memlaw.report import make_report

    out = given.out or Path("report.html" if given.format == "html" else "report")
    for path in make_report(given.paths, out, format=given.format):
        print(path)
    return DONE
