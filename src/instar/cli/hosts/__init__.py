"""Several hosts on one machine: each is a set of namespaces with an agent, a libvirtd and guests of its own."""
