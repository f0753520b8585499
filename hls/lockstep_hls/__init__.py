"""The vector operations in header-only C++17, and the toolchain that builds them."""
