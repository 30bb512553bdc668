"""What `scikit_build_core.build` offers, without running CMake."""

from pkg_info import prepare_metadata_for_build_wheel

__all__ = ["prepare_metadata_for_build_wheel"]
