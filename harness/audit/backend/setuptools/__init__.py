"""Stands before setuptools while pip downloads an sdist; see pkg_info."""
