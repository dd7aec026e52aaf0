"""Backend `triton`: GPU kernels, their launches (`launch`), and how they are compiled (`tuning`, `tables/`, `tune`)."""
