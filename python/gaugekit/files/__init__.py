"""What is written on a disk and stays there: durable writes, folders in the making, where results may be put."""
