"""The life of a request, without sockets, clocks or tasks: events in, commands out."""
