"""Run configurations that come with fp8jax; each file's get_config(size) builds on common.py and
sets what differs.
"""
