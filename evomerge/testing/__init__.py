"""Conformance suites, fakes and tiny models for tests of this project and of plugins."""
