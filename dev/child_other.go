// What child_linux.go does, as far as other systems can.

//go:build !linux

package main

import (
	"os"
	"syscall"
)

// childAttr puts a child into a group.
func childAttr(pgid int) *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Setpgid: true, Pgid: pgid}
}

// selfPath is the file that this program was started from.
func selfPath() (string, error) { return os.Executable() }
