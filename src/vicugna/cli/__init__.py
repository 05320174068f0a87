"""The `vicugna` command line: one file per verb; exit codes and error lines."""

import os
import signal
import sys
from typing import Annotated, NoReturn

try:
    import typer

    from vicugna.cli import output
    from vicugna.cli.bench import bench
    from vicugna.cli.chat import chat
    from vicugna.cli.convert import convert
    from vicugna.cli.eval import evaluate
    from vicugna.cli.info import info
    from vicugna.cli.ledger import ledger
    from vicugna.cli.plan import plan
    from vicugna.cli.release import release
    from vicugna.cli.run import run, train
    from vicugna.cli.serve import serve
    from vicugna.cli.verify import verify
except KeyboardInterrupt:  # no handler is set yet
    print("vicugna: interrupted", file=sys.stderr)
    raise SystemExit(130) from None
from vicugna.errors import VicugnaError
from vicugna.files import storage_error

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
                  help="Train, evaluate, release and serve Llama-class language models.")
for verb in (run, train, evaluate, chat, serve, convert, release, verify, ledger, bench, info,
             plan):
    app.command("eval" if verb is evaluate else None)(verb)


@app.callback()
def _options(debug: Annotated[bool, typer.Option(help="Print tracebacks.")] = False) -> None:
    if debug:
        os.environ["VICUGNA_DEBUG"] = "1"


def main() -> NoReturn:
    """Run the command line: exits 0 done, 1 the answer is no, 2 the input was wrong."""
    output.prepare_streams()
    interrupts: list[int] = []

    def interrupted(number: int, frame: object) -> None:
        interrupts.append(number)
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupted)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as under nohup
        signal.signal(signal.SIGHUP, interrupted)  # the terminal was closed
    try:
        code = app(standalone_mode=False)
        if code != 130:
            sys.exit(code if isinstance(code, int) else 0)
        raise KeyboardInterrupt  # which Typer had caught
    except VicugnaError as error:
        _exit(str(error), error.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except (Exception, KeyboardInterrupt) as error:
        if interrupts:  # an interrupted import may raise anything
            _exit("interrupted. A run resumes where it stopped: repeat the command", 130)
        if isinstance(error, OSError):
            _exit(str(storage_error(error, error.filename or "a file")), 2)
        if hasattr(error, "format_message"):  # Typer's, of wrong usage
            _exit(error.format_message(), 2)
        _exit(f"unexpected {type(error).__name__}: {error}. Run with --debug for the place, "
              "and please report it", 2)


def _exit(line: str, code: int) -> NoReturn:
    if os.environ.get("VICUGNA_DEBUG"):
        raise  # it is called while an exception is handled
    print(f"vicugna: {' '.join(line.split())}", file=sys.stderr)
    sys.exit(code)
