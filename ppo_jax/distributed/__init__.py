"""Meshes, shardings, processes and the runtime.

`layout` places arrays on a mesh, `processes` runs several processes as one program, `runtime` sets
up compilation cache and memory, `shares` divides a machine. Imports `config`, `models` and below.
Start with `layout`.
"""
