// Ports: which are free, and who has the others.

package main

import (
	"bufio"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

const (
	// portPatience outlasts the end of a ClickHouse whose dev was killed a moment ago, on a busy machine.
	portPatience = 5 * time.Second
	portPoll     = 50 * time.Millisecond

	// Free ports come from below the ranges from which the kernels take the ports of outgoing connections (32768 and up
	// on Linux, 49152 on the others): one of those could take a port while the server behind it is being restarted.
	firstFreePort, lastFreePort = 20000, 32000
)

// portsFree returns an error that names every port that is taken and by whom.
func portsFree(ports []int) error {
	for deadline := time.Now().Add(portPatience); ; time.Sleep(portPoll) {
		var taken []error
		for _, port := range ports {
			err := tryPort(port)
			switch {
			case errors.Is(err, syscall.EADDRINUSE):
				taken = append(taken, fmt.Errorf("port %d is taken by %s", port, portOwner(port)))
			case err != nil:
				return err
			}
		}
		if len(taken) == 0 || time.Now().After(deadline) {
			return errors.Join(taken...)
		}
	}
}

// tryPort listens on a port for a moment.
func tryPort(port int) error {
	l, err := net.Listen("tcp", "127.0.0.1:"+strconv.Itoa(port))
	if err != nil {
		return err
	}
	return l.Close()
}

// freePorts returns n ports that nobody listens on, others than those given. Nothing reserves them: they are drawn at
// random, so that two devs that start at once do not meet.
func freePorts(n int, others ...int) ([]int, error) {
	var ports []int
	for range 1000 {
		if len(ports) == n {
			return ports, nil
		}
		port := firstFreePort + rand.IntN(lastFreePort-firstFreePort)
		if slices.Contains(others, port) {
			continue
		}
		l, err := net.Listen("tcp", "127.0.0.1:"+strconv.Itoa(port))
		if err != nil {
			continue
		}
		defer l.Close() // all of them at the end: no port comes twice
		ports = append(ports, port)
	}
	return nil, fmt.Errorf("no %d free ports between %d and %d", n, firstFreePort, lastFreePort)
}

// portOwner describes the process that listens on a TCP port of this machine, as far as this user may know.
func portOwner(port int) string {
	if inode := listenInode(port); inode != "" {
		links, _ := filepath.Glob("/proc/[0-9]*/fd/*")
		for _, link := range links {
			if target, _ := os.Readlink(link); target == "socket:["+inode+"]" {
				pid := strings.Split(link, "/")[2]
				cmdline, _ := os.ReadFile("/proc/" + pid + "/cmdline")
				return describe(pid, strings.ReplaceAll(string(cmdline), "\x00", " "))
			}
		}
	}
	out, _ := exec.Command("lsof", "-nP", "-iTCP:"+strconv.Itoa(port), "-sTCP:LISTEN", "-Fpc").Output()
	var pid, command string
	for _, line := range strings.Split(string(out), "\n") { // p<pid>, c<command>, f<descriptor>, …
		if s, ok := strings.CutPrefix(line, "p"); ok && pid == "" {
			pid = s
		} else if s, ok := strings.CutPrefix(line, "c"); ok && command == "" {
			command = s
		}
	}
	if pid == "" {
		return "an unknown process (one of another user?)"
	}
	return describe(pid, command)
}

// describe cuts a command that would fill the terminal.
func describe(pid, command string) string {
	const most = 120 // bytes
	command = strings.TrimSpace(command)
	if len(command) > most {
		command = command[:most] + "…"
	}
	return fmt.Sprintf("pid %s (%s)", pid, command)
}

// listenInode finds the listening socket of a port in Linux's tables; "" where there are none.
func listenInode(port int) string {
	const stateListen = "0A" // TCP_LISTEN in include/net/tcp_states.h
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
