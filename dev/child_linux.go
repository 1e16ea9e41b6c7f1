// What only Linux does for children, and how it finds this program.

package main

import "syscall"

// childAttr puts a child into a group and has the kernel kill it with the thread that starts it, so that it does not
// outlive dev even when it is stopped (SIGSTOP) or dev and the guard are killed in one go.
func childAttr(pgid int) *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Setpgid: true, Pgid: pgid, Pdeathsig: syscall.SIGKILL}
}

// selfPath is this program, even after a build has replaced the file.
func selfPath() (string, error) { return "/proc/self/exe", nil }
