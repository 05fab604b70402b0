"""Tests with real peers, each an operating system process of its own."""
