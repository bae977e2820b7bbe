"""Thin Prefect tasks round core functions."""
