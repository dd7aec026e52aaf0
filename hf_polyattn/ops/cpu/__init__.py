"""Backend `cpu`: C++ kernels (`csrc/`), compiled at first use (`build`), and their calls (`launch`)."""
