package serve

import (
	"bufio"
	"context"
	"encoding/json"
	"io"
	"net"
	"strings"
	"sync"

	"forkd.dev/forkd/tests/shop/internal/who"
)

// maxHeld bounds what a connection in "hold" may send before it ends its side.
const maxHeld = 64 << 20

// startQueue serves two ports of plain TCP. On the first the server speaks first: it says who answered, then
// echoes. On the second the client does, and everything is echoed but these first words:
//
//	whoami  is answered by who answered
//	hold    is answered after the client's half-close: who answered, then all that was sent
//	reset   is answered by a reset
func startQueue(s *Service, listen []string) error {
	for i, serve := range []func(*net.TCPConn, who.Answer){greet, listenFirst} {
		l, err := s.listen(listen[i])
		if err != nil {
			return err
		}
		serveTCP(s, l, serve)
	}
	return nil
}

// serveTCP hands every connection to serve, and closes all of them when the service stops.
func serveTCP(s *Service, l net.Listener, serve func(*net.TCPConn, who.Answer)) {
	var open sync.Map
	s.onStop(func(context.Context) {
		l.Close()
		open.Range(func(conn, _ any) bool { conn.(net.Conn).Close(); return true })
	})
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				s.fail(err)
				return
			}
			open.Store(conn, nil)
			go func() {
				defer open.Delete(conn)
				defer conn.Close()
				serve(conn.(*net.TCPConn), s.self.Answer("TCP", ""))
			}()
		}
	}()
}

func greet(conn *net.TCPConn, answer who.Answer) {
	if json.NewEncoder(conn).Encode(answer) == nil {
		io.Copy(conn, conn)
	}
}

func listenFirst(conn *net.TCPConn, answer who.Answer) {
	in := bufio.NewReader(conn)
	switch firstWord(in) {
	case "whoami":
		json.NewEncoder(conn).Encode(answer)
	case "hold":
		held, err := io.ReadAll(io.LimitReader(in, maxHeld))
		if err != nil {
			return
		}
		json.NewEncoder(conn).Encode(answer)
		conn.Write(held)
		return
	case "reset":
		conn.SetLinger(0)
		return
	}
	io.Copy(conn, in)
}

// firstWord takes a command line off the stream if one is there, and leaves anything else as it is.
func firstWord(in *bufio.Reader) string {
	in.Peek(1)
	for _, word := range []string{"whoami", "hold", "reset"} {
		for {
			got, _ := in.Peek(min(in.Buffered(), len(word)+1))
			if string(got) == word+"\n" {
				in.Discard(len(got))
				return word
			}
			if !strings.HasPrefix(word+"\n", string(got)) {
				break
			}
			if _, err := in.Peek(len(got) + 1); err != nil { // a part of the word: wait for the next byte
				return ""
			}
		}
	}
	return ""
}
