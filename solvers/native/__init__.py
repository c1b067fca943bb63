"""Which C++ kernels are compiled for this machine's processor, and could they be built?"""

from solvers.native.library import Build, build, status

__all__ = ["Build", "build", "status"]
