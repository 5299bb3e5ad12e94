"""Fit adapters to slots and add them to bundles."""
