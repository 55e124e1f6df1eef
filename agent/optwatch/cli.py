"""The `optwatch` command: finds subcommands among the entry points of group ``optwatch.commands``."""

from __future__ import annotations

import sys
from importlib.metadata import entry_points, version

USAGE = "usage: optwatch COMMAND [OPTIONS]\n\ncommands:\n{commands}\n\n`optwatch COMMAND --help` describes each."


def main(arguments: list[str] | None = None) -> int:
    """Run one subcommand with the arguments that follow it, and return its exit status.

    Each entry point is a function ``(arguments: list[str]) -> int``. The server's commands are found this way, so that
    the agent never imports the server.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    commands = {entry.name: entry for entry in entry_points(group="optwatch.commands")}
    usage = USAGE.format(commands="\n".join(f"  {name}" for name in sorted(commands)))
    if arguments[:1] == ["--version"]:
        print(f"optwatch {version('optwatch')}")
        return 0
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage)
        return 0 if arguments else 2
    name, *rest = arguments
    if name not in commands:
        print(f"optwatch: no command {name!r}; known: {', '.join(sorted(commands))}\n\n{usage}", file=sys.stderr)
        return 2
    try:
        command = commands[name].load()
    except ModuleNotFoundError as error:
        print(
            f"optwatch {name}: the module {error.name!r} is not installed; pip install 'optwatch[server]' brings it",
            file=sys.stderr,
        )
        return 1
    return int(command(rest))
