# Sourced by the other scripts: is an environment active that was made for a purpose? Conda's base, which is on by
# default, is not: what is installed there changes it for everything else.
has_environment() {
    [ -n "${VIRTUAL_ENV:-}" ] || { [ -n "${CONDA_PREFIX:-}" ] && [ "${CONDA_DEFAULT_ENV:-base}" != base ]; }
}
