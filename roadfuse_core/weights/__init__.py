"""Shipped weights with their recipes; see README.md beside this file."""
