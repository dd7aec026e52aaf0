"""The sums, solves and choices behind calibration, for one attention module.

`packing` makes rows of what a layer saw, and `row_store` keeps them for the next pass.
`layer.LayerFit` composes what each file here can do alone: `row_shift` moves the scores of all rows to one interval,
`interval` says which intervals are worth trying, `coefficients` fits a polynomial to each, and `errors` measures them.
Nothing is written to the module before `LayerFit.write`.

Letters: H heads, G key/value heads, C intervals that are tried, K = P + 1 coefficients, b batch entries. All sums are
float64.

Source: DESIGN.md, "Calibration in closed form".
"""
