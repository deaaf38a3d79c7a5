"""The tests, as a package of their own: a library that the tests need (torch-fidelity) installs one of this name."""
