"""What `setuptools.build_meta` and its `__legacy__` offer, without running `setup.py`."""

import pkg_info
from pkg_info import prepare_metadata_for_build_wheel

__legacy__ = pkg_info
__all__ = ["__legacy__", "prepare_metadata_for_build_wheel"]
