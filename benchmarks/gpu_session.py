"""Everything that a GPU should be asked, in order of value, in less than twelve minutes: on a machine lent for minutes.

    python benchmarks/gpu_session.py --output out [--wheels FOLDER | --install]      # on the GPU's machine
    python benchmarks/gpu_session.py --output out --resume                           # goes on with what is not done
    python benchmarks/gpu_session.py --output try --rehearse                         # anywhere: tiny sizes, on the CPU

Each part is a process with a time limit; one that fails or is stopped does not stop the others, and what it has written
is kept. After each of them OUTPUT has `session.json` (all reports), `summary.md`, `log.txt` (all that was printed) and
`tiles.json` (the shipped table with the rows that were tuned, which the parts after it use already). Compiled programs
and the model to decode with are kept in SCRATCH, so that a second try is quicker.
"""

import argparse
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parents[1]
# On a bare machine the package is not installed.
sys.path.insert(0, str(ROOT))

from lib.session_parts import DONE, INTERRUPTED, Part, Session, clock, read_results, run_session, say  # noqa: E402
from lib.session_tables import (  # noqa: E402
    commit_table,
    drafting_table,
    kernels_table,
    machine_table,
    tiles_rows,
    train_table,
    verify_table,
)

from lin_jax.errors import OptionParser, UserError, exit_cleanly  # noqa: E402

LIMIT, REHEARSAL_PATIENCE = 720.0, 10.0
SHIPPED = ROOT / "pallas_kernels" / "tiles.json"
INSTALL_SECONDS = 45.0
# What the package index is asked for; the package itself runs from this folder.
PACKAGES = (".[gpu]", "pytest>=8.4", "pytest-xdist>=3.8", "hypothesis>=6.130", "flash-linear-attention")
JSON = ("--json", "{report}")
# What was tuned before.
TILES = ("--tiles", "{output}/tiles.json")
THREADS = str(min(os.cpu_count() or 1, 8))
KERNELS = ("benchmarks/kernels.py", *JSON, *TILES, "--without-verify")
KERNELS_ASKED = (
    *("--implementations", "gpu", "--threads", THREADS, "--rounds", "3", "--seconds", "0.1"),
    *("--operations", "augmented", "linear"),
)
KERNELS_TRIED = (
    *("--operations", "augmented", "--implementations", "gpu_interpreted", "--threads", "2"),
    *("--shapes", "1,70,1,16", "--rounds", "1", "--seconds", "0.001"),
)

PARTS = (
    Part(
        "machine",
        ("benchmarks/machine.py", *JSON),
        20,
        ("--platform", "gpu"),
        ("--platform", "cpu"),
        table=machine_table,
    ),
    Part(
        "smoke",
        ("-m", "pytest", "tests/pallas_kernels", "-v", "-W", "default", "-p", "no:cacheprovider"),
        60,
        ("-m", "gpu and not thorough", "-n", "6", "--dist", "load"),
        ("-m", "not thorough", "-k", "gpu_interpreted and test_path_commit", "-n", "0"),
        # Several processes share the memory.
        {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
    ),
    Part(
        "tune",
        ("-m", "pallas_kernels.tune", "--verbose", "--table", "{report}"),
        110,
        ("--sizes", "128", "64", "256", "--seconds", "0.05", "--limit", "90"),
        (
            *("--implementation", "gpu_interpreted", "--operations", "path_commit", "--candidates", "2"),
            *("--batch", "1", "--heads", "1", "--tokens", "20", "--sizes", "32", "--dtypes", "float32"),
            *("--seconds", "0.001"),
        ),
        table=partial(tiles_rows, SHIPPED),
        report="{output}/tiles.json",
    ),
    Part(
        "kernels",
        (*KERNELS, "--peers", "softmax"),
        80,
        (*KERNELS_ASKED, "windowed"),
        KERNELS_TRIED,
        table=kernels_table,
    ),
    # Its kernels are tuned when they are first run, which takes its time.
    Part(
        "beside-fla",
        (*KERNELS, "--peers", "flash-linear-attention"),
        80,
        KERNELS_ASKED,
        KERNELS_TRIED,
        table=kernels_table,
    ),
    Part(
        "train",
        ("benchmarks/train_speed.py", *JSON, *TILES),
        165,
        ("--size", "1b", "--lengths", "2048", "8192", "32768", "--steps", "4", "--threads", "3"),
        ("--size", "tiny", "--lengths", "16", "32", "--tokens", "64", "--part", "32", "--steps", "1", "--threads", "2"),
        # A model of 1.2 billion parameters with moments in float32 leaves little of 80 GB.
        {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92"},
        train_table,
    ),
    Part(
        "drafting",
        ("benchmarks/drafting_speed.py", *JSON, *TILES, "--keep", "{scratch}/drafting.npz"),
        110,
        ("--size", "110m", "--batches", "1", "8", "32"),
        (
            *("--size", "tiny", "--batches", "1", "--trees", "chain:1", "--nodes", "1", "2", "--prompt", "16"),
            *("--tokens", "12", "--rounds", "2", "--rows", "2", "--length", "32", "--train-steps", "3"),
            *("--head-steps", "2", "--threads", "2"),
        ),
        table=drafting_table,
    ),
    Part(
        "verify",
        ("benchmarks/kernels.py", *JSON, *TILES, "--operations", "none"),
        30,
        (
            *("--implementations", "gpu", "--nodes", "1", "8", "16", "64", "--batches", "1", "8", "32"),
            *("--threads", THREADS, "--rounds", "3", "--seconds", "0.05"),
        ),
        (
            *("--implementations", "gpu_interpreted", "--nodes", "1", "4", "--batches", "1", "--threads", "2"),
            *("--rounds", "1", "--seconds", "0.001"),
        ),
        table=verify_table,
    ),
    Part(
        "commit",
        ("benchmarks/path_commit.py", *JSON, *TILES),
        20,
        ("--implementations", "gpu", "xla"),
        (
            *("--implementations", "gpu_interpreted", "xla", "--batches", "2", "--dtypes", "float32", "--heads", "1"),
            *("--size", "16", "--group", "8", "--path", "4", "--commits", "6", "--rounds", "2"),
        ),
        table=commit_table,
    ),
)
# Asked for by name only, with the limits that they have apart from the session's own.
FURTHER = (
    Part(
        "fla-warm-up",
        ("benchmarks/train_peer.py", "--num-layers", "1", "--steps", "1"),
        240,
        ("--lengths", "2048", "--tokens", "16384"),
        ("--help",),
        {"TRITON_CACHE_AUTOTUNING": "1"},
    ),
    Part(
        "fla-model",
        ("benchmarks/train_peer.py",),
        240,
        ("--lengths", "2048", "8192", "32768", "--steps", "4"),
        ("--help",),
        {"TRITON_CACHE_AUTOTUNING": "1"},
    ),
)
NOTES = (
    "Left out: training flash-linear-attention's own model, whose Triton kernels once took more than 110 s to compile; "
    "`--resume --limit 480 --parts fla-warm-up fla-model` compiles them first. Its kernels alone are timed here.",
    "Rows that were tuned can be pasted into `pallas_kernels/tiles.json`; the whole table lies beside this file.",
)


def main() -> int:
    """Runs the parts, and says what is missing; 1 if anything is."""
    # Whoever ends the session (a lease's own clock, say) ends its part, and what is known is kept.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    options = parse()
    parts = chosen(options)
    session = prepared(options)
    say(f"{len(parts)} parts, at most {clock(session.limit)}, results in {session.output}")
    names = {part.name for part in parts}
    results = run_session(session, parts, [part for part in (*PARTS, *FURTHER) if part.name not in names])
    if session.file.exists():
        say(f"\n{(session.output / 'summary.md').read_text(encoding='utf-8')}")
    states = [results["parts"].get(part.name, {}).get("state") for part in parts]
    return 130 if INTERRUPTED in states else int(any(state != DONE for state in states))


def parse() -> argparse.Namespace:
    """The command line."""
    parser = OptionParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="of the results")
    parser.add_argument("--scratch", type=Path, metavar="FOLDER", help="default: in the system's temporary folder")
    parser.add_argument("--resume", action="store_true", help="go on with what OUTPUT says is not done")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on this machine's CPU")
    parser.add_argument("--limit", type=float, metavar="SECONDS", help=f"of all parts together, {LIMIT:.0f} by default")
    parser.add_argument(
        "--patience", type=float, metavar="TIMES", help="that a part may take its limit, 10 to rehearse"
    )
    names = [part.name for part in (*PARTS, *FURTHER)]
    parser.add_argument("--parts", nargs="+", choices=names, metavar="NAME", help=f"only these of {', '.join(names)}")
    install = parser.add_mutually_exclusive_group()
    install.add_argument("--wheels", type=Path, metavar="FOLDER", help="install these first, without an index")
    install.add_argument("--install", action="store_true", help="install what is needed first, from the index")
    options = parser.parse_args()
    # A rehearsal shares its processors with others, and nobody waits for it.
    options.patience = options.patience or (REHEARSAL_PATIENCE if options.rehearse else 1.0)
    options.limit = options.limit or LIMIT * options.patience
    if min(options.limit, options.patience) <= 0:
        raise UserError("--limit and --patience must be above 0")
    return options


def chosen(options: argparse.Namespace) -> list[Part]:
    """The parts to run, installation first if it is asked for."""
    wanted = options.parts or [part.name for part in PARTS]
    parts = [part for part in (*PARTS, *FURTHER) if part.name in wanted]
    if options.wheels is not None:
        wheels = sorted(str(each.resolve()) for each in options.wheels.glob("*.whl"))
        if not wheels:
            raise UserError(f"--wheels {options.wheels} holds no wheels (*.whl); give a folder that does")
        where = ("--no-index", "--no-deps", "--no-compile", "--upgrade", "--target", "{scratch}/site")
        return [Part("install", ("-m", "pip", "install", "-q", *where, *wheels), INSTALL_SECONDS), *parts]
    if options.install:
        tried = ("-m", "pip", "install", "-q", *(["--dry-run"] if options.rehearse else []), *PACKAGES)
        return [Part("install", tried, INSTALL_SECONDS), *parts]
    return parts


def prepared(options: argparse.Namespace) -> Session:
    """Folders, variables and the table of tiles.

    Raises:
        UserError: there is no GPU to ask, or the folder has results that are not to be lost.
    """
    if not options.rehearse and not has_gpu():
        raise UserError(
            "there is no NVIDIA GPU here (nvidia-smi finds none); give --rehearse to try the parts on the CPU"
        )
    kind = "rehearsal" if options.rehearse else "session"
    scratch = options.scratch or Path(tempfile.gettempdir()) / f"lin_jax_gpu_{kind}"
    scratch, output = scratch.resolve(), options.output.resolve()
    environment = variables(output, scratch, options)
    session = Session(output, scratch, options.limit, options.rehearse, options.patience, environment, NOTES)
    earlier = read_results(session)
    if earlier is not None and not options.resume:
        raise UserError(f"{output} has results already; give --resume, or another --output")
    if earlier is not None and earlier["rehearsal"] != options.rehearse:
        raise UserError(f"{output} has results of a {'rehearsal' if earlier['rehearsal'] else 'device'}; give another")
    for folder in (output, scratch):
        folder.mkdir(parents=True, exist_ok=True)
    if not (output / "tiles.json").exists():
        shutil.copyfile(SHIPPED, output / "tiles.json")
    return session


def variables(output: Path, scratch: Path, options: argparse.Namespace) -> dict[str, str]:
    """Environment of all parts."""
    given = os.environ.get("PYTHONPATH", "")
    found = {
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), str(scratch / "site"), given))),
        "JAX_COMPILATION_CACHE_DIR": str(scratch / "programs"),
        # What is measured here decides nothing later.
        "LIN_JAX_CACHE": "off",
        "TQDM_MININTERVAL": "5",
    }
    if options.rehearse:
        # Most of the time of a tiny program is its compilation.
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false".strip()
        found |= {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "XLA_FLAGS": flags}
        if importlib.util.find_spec("triton") is not None:
            found["TRITON_INTERPRET"] = "1"
    return found


def has_gpu() -> bool:
    """True if nvidia-smi names a GPU."""
    if shutil.which("nvidia-smi") is None:
        return False
    found = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return found.returncode == 0 and "GPU" in found.stdout


if __name__ == "__main__":
    exit_cleanly(main)
