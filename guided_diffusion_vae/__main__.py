"""The program `gdvae`, also `python -m guided_diffusion_vae`: run a command of the pipeline, list or complete them."""

import importlib
import sys
from pathlib import Path

from . import __version__
from .config import nearest
from .programs import COMMANDS, NAMES, PROGRAMS, spell, summarize

COMPLETION = """\
_gdvae() {{
    local current=${{COMP_WORDS[COMP_CWORD]}} words=""
    if [ "$COMP_CWORD" = 1 ]; then
        words="{commands}"
    elif [[ $current == -* ]]; then
        case ${{COMP_WORDS[1]//_/-}} in
{flags}
        esac
    else
        case ${{COMP_WORDS[COMP_CWORD-1]}} in
{values}
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "$current"))
}}
complete -o default -F _gdvae gdvae"""


def main():
    """Run the command in `sys.argv`, which then is that of its script.

    :raises SystemExit: if there is no such command.
    """
    program = PROGRAMS[Path(sys.argv[0]).name == "__main__.py"]
    word, *words = sys.argv[1:] or ["--help"]
    name = word.replace("-", "_")
    if word in ("-h", "--help"):
        print(format_commands(program))
    elif word == "--version":
        print(f"{program} {__version__}")
    elif word == "completion":
        print(format_completion(*words))
    elif name in NAMES:
        sys.argv = [f"{program} {spell(name)}", *words]
        importlib.import_module(f"{__package__}.commands.{name}").main.launch()
    else:
        hint = nearest(word, map(spell, NAMES))
        print(f"error: unknown command {word!r}{hint} ({program} --help lists all commands)", file=sys.stderr)
        sys.exit(2)


def format_commands(program):
    """Return the help: all commands in the order of the pipeline, one line each."""
    lines = [f"usage: {program} COMMAND [--config FILE.yaml] [--flag value ...]", "",
             "Latent diffusion on images and volumes. COMMAND --help prints the flags of a command."]
    for heading, names in COMMANDS.items():
        lines += ["", f"{heading}:", *(f"  {spell(name):<18} {summarize(name)}" for name in names)]
    completion = f"  {'completion bash':<18} Print a script of tab completion for bash, and for zsh after bashcompinit."
    return "\n".join([*lines, "", "shell:", completion])


def format_completion(shell=""):
    """Return a script that completes commands, flags, and values of flags with choices.

    :raises SystemExit: if the shell is not bash.
    """
    if shell != "bash":
        sys.exit(f"error: no completion for {shell!r}: expected bash; gdvae completion bash")
    from .runs.flags import shipped_configs

    flags = {spell(name): importlib.import_module(f"{__package__}.commands.{name}").main.argparser().words
             for name in NAMES}
    values = {}     # by flag, of all commands together
    for words in flags.values():
        for flag, texts in words.items():
            values.setdefault(flag, {}).update(dict.fromkeys(texts))
    values["--config"] = shipped_configs()
    same = {}   # flags by values: one line per set of values
    for flag, texts in values.items():
        same.setdefault(" ".join(texts), []).append(flag)
    case = lambda names, words: f'            {names}) words="{words}" ;;'
    return COMPLETION.format(
        commands=" ".join(flags), flags="\n".join(case(name, " ".join(words)) for name, words in flags.items()),
        values="\n".join(case("|".join(names), texts) for texts, names in same.items() if texts))


if __name__ == "__main__":
    main()
