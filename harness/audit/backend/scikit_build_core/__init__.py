"""Stands before scikit-build-core while pip downloads an sdist; see pkg_info."""
