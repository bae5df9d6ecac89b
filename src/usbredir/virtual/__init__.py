"""Devices written in Python."""
