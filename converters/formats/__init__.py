"""Adapter formats, one file each, and what they share; `registry` finds them."""
