// Ports: free or not, and who has them.

package main

import (
	"bufio"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
)

// portsFree returns an error that names every port that is taken and by whom.
func portsFree(ports []int) error {
	var taken []error
	for _, port := range ports {
		l, err := net.Listen("tcp", "127.0.0.1:"+strconv.Itoa(port))
		if err != nil {
			taken = append(taken, fmt.Errorf("port %d is taken by %s", port, portOwner(port)))
			continue
		}
		l.Close()
	}
	return errors.Join(taken...)
}

// portOwner describes the process that listens on a TCP port of this machine, as far as this user may know.
func portOwner(port int) string {
	if inode := listenInode(port); inode != "" {
		links, _ := filepath.Glob("/proc/[0-9]*/fd/*")
		for _, link := range links {
			if target, _ := os.Readlink(link); target == "socket:["+inode+"]" {
				pid := strings.Split(link, "/")[2]
				cmdline, _ := os.ReadFile("/proc/" + pid + "/cmdline")
				return fmt.Sprintf("pid %s (%s)", pid, strings.TrimSpace(strings.ReplaceAll(string(cmdline), "\x00", " ")))
			}
		}
	}
	out, _ := exec.Command("lsof", "-nP", "-iTCP:"+strconv.Itoa(port), "-sTCP:LISTEN", "-Fpc").Output()
	var pid, command string
	for _, line := range strings.Split(string(out), "\n") {
		if s, ok := strings.CutPrefix(line, "p"); ok {
			pid = s
		} else if s, ok := strings.CutPrefix(line, "c"); ok {
			command = s
		}
	}
	if pid != "" {
		return fmt.Sprintf("pid %s (%s)", pid, command)
	}
	return "a process that this user may not see"
}

// listenInode finds the listening socket of a port in Linux's tables; "" where there are none.
func listenInode(port int) string {
	const stateListen = "0A"
	suffix := fmt.Sprintf(":%04X", port)
	for _, table := range []string{"/proc/net/tcp", "/proc/net/tcp6"} {
		f, err := os.Open(table)
		if err != nil {
			continue
		}
		defer f.Close()
		for s := bufio.NewScanner(f); s.Scan(); {
			// sl local_address rem_address st tx:rx tr:when retrnsmt uid timeout inode
			if c := strings.Fields(s.Text()); len(c) > 9 && c[3] == stateListen && strings.HasSuffix(c[1], suffix) {
				return c[9]
			}
		}
	}
	return ""
}
