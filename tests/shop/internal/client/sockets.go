package client

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"time"

	"github.com/coder/websocket"

	"forkd.dev/forkd/tests/shop/internal/who"
)

// defaultBytes is the size of a message that no flag gives.
const defaultBytes = 64

func askWebSocket(ctx context.Context, o *options, key string, line *Line) error {
	header := http.Header{}
	for name, values := range who.Carry(o.carrier, key) {
		header.Set(name, values[0])
	}
	path := o.path
	if path == "/" {
		path = "/ws"
	}
	conn, resp, err := websocket.Dial(ctx, "ws://"+o.addr+path, &websocket.DialOptions{HTTPHeader: header})
	if resp != nil {
		line.Status, line.Proto = resp.StatusCode, "WebSocket"
		line.ServedBy = resp.Header.Get("forkd-served-by")
	}
	if err != nil {
		return err
	}
	defer conn.CloseNow()
	conn.SetReadLimit(16 << 20)
	_, first, err := conn.Read(ctx)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(first, &line.Answer); err != nil {
		return err
	}
	message := payload(cmp.Or(o.bytes, defaultBytes))
	same := true
	line.Same = &same
	for range o.n {
		if err := conn.Write(ctx, websocket.MessageBinary, message); err != nil {
			return err
		}
		_, echo, err := conn.Read(ctx)
		if err != nil {
			return err
		}
		line.Messages++
		line.Bytes += int64(len(echo))
		same = same && bytes.Equal(echo, message)
	}
	return conn.Close(websocket.StatusNormalClosure, "")
}

// dial connects and makes the connection end with ctx.
func dial(ctx context.Context, network string, o *options, line *Line) (net.Conn, error) {
	conn, err := new(net.Dialer).DialContext(ctx, network, o.addr)
	if err != nil {
		return nil, err
	}
	if deadline, ok := ctx.Deadline(); ok {
		conn.SetDeadline(deadline)
	}
	line.Conn = conn.LocalAddr().String()
	return conn, nil
}

func askTCP(ctx context.Context, o *options, _ string, line *Line) error {
	return askStream(ctx, o, "whoami\n", line)
}

func askGreeting(ctx context.Context, o *options, _ string, line *Line) error {
	return askStream(ctx, o, "", line)
}

// askStream says hello, reads who answered, and has n messages echoed.
func askStream(ctx context.Context, o *options, hello string, line *Line) error {
	start := time.Now()
	conn, err := dial(ctx, "tcp", o, line)
	if err != nil {
		return err
	}
	defer conn.Close()
	if _, err := io.WriteString(conn, hello); err != nil {
		return err
	}
	in := bufio.NewReader(conn)
	if err := line.readWho(in, start); err != nil {
		return err
	}
	message := payload(cmp.Or(o.bytes, defaultBytes))
	echo := make([]byte, len(message))
	same := true
	line.Same = &same
	for range o.n {
		if err := exchange(conn, in, message, echo); err != nil {
			return err
		}
		line.Messages++
		line.Bytes += int64(len(echo))
		same = same && bytes.Equal(echo, message)
	}
	return nil
}

// exchange writes and reads at the same time, so that no message is too large for the buffers on the way.
func exchange(conn net.Conn, in io.Reader, message, echo []byte) error {
	written := make(chan error, 1)
	go func() {
		_, err := conn.Write(message)
		written <- err
	}()
	if _, err := io.ReadFull(in, echo); err != nil {
		return err
	}
	return <-written
}

func askHalfClose(ctx context.Context, o *options, _ string, line *Line) error {
	start := time.Now()
	conn, err := dial(ctx, "tcp", o, line)
	if err != nil {
		return err
	}
	defer conn.Close()
	message := payload(cmp.Or(o.bytes, 64<<10))
	if _, err := conn.Write(append([]byte("hold\n"), message...)); err != nil {
		return err
	}
	if err := conn.(*net.TCPConn).CloseWrite(); err != nil {
		return err
	}
	in := bufio.NewReader(conn)
	if err := line.readWho(in, start); err != nil {
		return err
	}
	same := compare{want: message}
	line.Bytes, err = io.Copy(&same, in)
	line.Same = same.result()
	return err
}

// askReset succeeds if the peer's reset arrives as a reset.
func askReset(ctx context.Context, o *options, _ string, line *Line) error {
	conn, err := dial(ctx, "tcp", o, line)
	if err != nil {
		return err
	}
	defer conn.Close()
	if _, err := io.WriteString(conn, "reset\n"); err != nil {
		return err
	}
	_, err = conn.Read(make([]byte, 1))
	line.Errno = errnoName(err)
	if line.Errno == "ECONNRESET" {
		return nil
	}
	return fmt.Errorf("expected a reset, got %v", err)
}

func askUDP(ctx context.Context, o *options, _ string, line *Line) error {
	start := time.Now()
	conn, err := dial(ctx, "udp", o, line)
	if err != nil {
		return err
	}
	defer conn.Close()
	message := payload(cmp.Or(o.bytes, defaultBytes))
	packet := make([]byte, 64<<10)
	same := true
	line.Same = &same
	for range o.n {
		if _, err := conn.Write(message); err != nil {
			return err
		}
		n, err := conn.Read(packet)
		if err != nil {
			return err
		}
		first, echo, found := bytes.Cut(packet[:n], []byte("\n"))
		if !found {
			return errors.New("the packet does not say who answered")
		}
		if line.Messages++; line.Messages == 1 {
			line.FirstMs = since(start)
			if err := json.Unmarshal(first, &line.Answer); err != nil {
				return err
			}
		}
		line.Bytes += int64(len(echo))
		same = same && bytes.Equal(echo, message)
	}
	return nil
}

func askConnect(ctx context.Context, o *options, _ string, line *Line) error {
	conn, err := dial(ctx, "tcp", o, line)
	if err != nil {
		return err
	}
	return conn.Close()
}

func (line *Line) readWho(in *bufio.Reader, start time.Time) error {
	first, err := in.ReadBytes('\n')
	if err != nil {
		return err
	}
	line.FirstMs = since(start)
	return json.Unmarshal(first, &line.Answer)
}
