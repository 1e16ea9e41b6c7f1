package main

import "syscall"

// childAttr puts a child into a group of its own and has the kernel kill it when dev dies without a word. The kernel
// ties that to the thread that started the child: main is locked to its thread, and starts every child from there.
func childAttr() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
}
