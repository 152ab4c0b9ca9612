"""Work spread over many machines by Dask: one job at a time on each worker, and a lost worker's job is run again."""
