"""Run configurations; each file's get_config(size) builds on common.py."""
