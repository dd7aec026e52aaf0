"""Backend `triton`: GPU kernels, their launches (`launch`), and their block sizes (`tuning`, `tables/`, `tune`)."""
