"""Any bytes, against what must hold of them: the same properties under hypothesis in CI and under atheris by hand."""
