"""Where gaugekit meets other packages; nothing here is imported unless it is used."""
