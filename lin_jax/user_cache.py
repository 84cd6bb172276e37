"""The user's cache folder: compiled programs and costs of steps, by kind of machine; deleting it costs only time."""

import importlib.util
import os
from pathlib import Path

import jax

from lin_jax.devices import machine_key

# Names another folder, or "off".
VARIABLE = "LIN_JAX_CACHE"
OFF = "off"
# JAX's setting for the folder of compiled programs, and the bytes that ours may take: the programs that were not used
# for longest make room.
PROGRAMS, LARGEST = "jax_compilation_cache_dir", 2 * 2**30


def cache_folder() -> Path | None:
    """Folder for what is of use on this kind of machine alone; None if the environment says off.

    Raises:
        UserError: JAX cannot use the platform that the environment asks for.
    """
    named = os.environ.get(VARIABLE, "")
    if named.strip().lower() == OFF:
        return None
    home = Path(named).expanduser() if named else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return (home if named else home / "lin_jax") / machine_key()


def keep_programs() -> Path | None:
    """Lets XLA keep compiled programs on the disk, so that a second call need not compile them; gives the folder.

    A folder that the environment chose for JAX (JAX_COMPILATION_CACHE_DIR) is left as it is. Nothing is kept where the
    folder cannot be written. Errors as in `cache_folder`.
    """
    chosen: str | None = jax.config.values[PROGRAMS]
    if chosen:
        return Path(chosen)
    folder = cache_folder()
    if folder is None:
        return None
    programs = folder / "programs"
    try:
        programs.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    if not os.access(programs, os.W_OK):
        return None
    jax.config.update(PROGRAMS, str(programs))
    # Small programs too: a first token needs dozens of them.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    if importlib.util.find_spec("filelock") is not None:
        # JAX counts bytes only where this package locks the folder.
        jax.config.update("jax_compilation_cache_max_size", LARGEST)
    return programs
