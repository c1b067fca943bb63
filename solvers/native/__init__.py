"""What is compiled for this machine's processor, and is it there?"""

from solvers.native.library import Build, build, status

__all__ = ["Build", "build", "status"]
