"""How does the command line start? As `lben` and as `python -m lben`, if it is installed."""

import sys


def main() -> int:
    """Run the command line and return its exit status; say in one line what it lacks."""
    try:
        from lben.cli import main as run
    except ModuleNotFoundError as error:
        if error.name not in ("tyro", "tqdm"):
            raise
        print(
            f"lben: the command line needs {error.name}, which is not installed: "
            "pip install 'lben[cli]'",
            file=sys.stderr,
        )
        return 1
    return run()


if __name__ == "__main__":
    sys.exit(main())
