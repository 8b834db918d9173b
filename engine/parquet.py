"""Parquet files on disk as a stream whose shards are row groups, each found by its file and then by its number there:
datasets' shard(i) goes through all of them.
"""

from engine.errors import UserError, first_line

import os
from bisect import bisect_right
from functools import lru_cache
from itertools import accumulate

ROWS = 32  # that are decoded at once


@lru_cache(maxsize=128)
def footer_of(file, written):
    """What a file says of itself, as it was `written`; with many row groups that takes a while to read."""
    import pyarrow.parquet as pq

    return pq.read_metadata(file)


def footer(file):
    """Its pyarrow.parquet.FileMetaData. Raises UserError."""
    try:
        return footer_of(file, os.stat(file).st_mtime_ns)
    except Exception as error:  # pyarrow has its own ways to refuse a file
        raise UserError(f"{file} cannot be read: {first_line(error)}") from error


class RowGroups:
    """The row groups of files, in order, as shards: some columns, cast to datasets' features. `num_rows` is of all;
    `empty` is a file without rows, or None.

    Raises UserError that names a file which cannot be read, or whose columns are others.
    """

    def __init__(self, files, columns, features):
        from datasets import Features

        self.files, self.columns = [str(file) for file in files], columns
        self.features = Features({column: features[column] for column in columns})
        groups, self.num_rows, self.empty = [], 0, None
        for file in self.files:
            found = footer(file)
            schema = found.schema.to_arrow_schema()
            missing = [column for column in columns if column not in schema.names]
            if missing:
                raise UserError(f"{file} has no column {missing[0]}, which other files of its split have: its columns "
                                f"are {', '.join(schema.names)}")  # fmt: skip
            try:
                self.cast(schema.empty_table().select(columns))
            except Exception as error:
                raise UserError(f"{file} has columns of another kind than other files of its split: "
                                f"{first_line(error)}") from error  # fmt: skip
            groups.append(found.num_row_groups)
            self.num_rows += found.num_rows
            self.empty = self.empty or (file if found.num_rows == 0 else None)
        self.ends = list(accumulate(groups))  # of each file, in shards

    @property
    def num_shards(self):
        return self.ends[-1] if self.ends else 0

    def __iter__(self):
        for shard in range(self.num_shards):
            yield from self.read(shard)

    def place(self, shard):
        """The file of a shard, and its row group there."""
        number = bisect_right(self.ends, shard)
        return self.files[number], shard - (self.ends[number - 1] if number else 0)

    def cast(self, table):
        from datasets.table import table_cast

        return table_cast(table, self.features.arrow_schema)

    def read(self, shard, row=0):
        """The rows of a shard from `row` on, as dicts. Raises whatever pyarrow raises."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        file, group = self.place(shard)
        with pq.ParquetFile(file, metadata=footer(file)) as parquet:
            for batch in parquet.iter_batches(ROWS, row_groups=[group], columns=self.columns, use_threads=False):
                if row < len(batch):
                    yield from self.cast(pa.Table.from_batches([batch.slice(row)])).to_pylist()
                row = max(0, row - len(batch))
