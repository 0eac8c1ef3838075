# What every job script does first: the cluster's own settings (slurm/site.sh, or the file named by CAPO_SITE), then a
# check that the package is installed. Sourced from the repository's root.
site=${CAPO_SITE:-slurm/site.sh}
if [ -f "$site" ]; then
  source "$site"
elif [ -n "${CAPO_SITE:-}" ]; then
  echo "error: CAPO_SITE names $CAPO_SITE, which is not there: copy slurm/site.sh.example to it" >&2
  exit 2
fi
[ -x .venv/bin/python ] || { echo "error: run 'make install' first, where the package index can be reached" >&2; exit 2; }
