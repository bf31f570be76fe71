# What NixOS' own modules add to a configuration like ours, as far as units, files and users of
# it are concerned. nixos/modules/… names where.
{
  config,
  lib,
  pkgs,
  ...
}:

let
  inherit (import ./files.nix { inherit config lib pkgs; }) containerdConfig;
in
{
  # config/networking.nix
  networking.hosts = {
    "127.0.0.1" = [ "localhost" ];
    "::1" = [ "localhost" ];
    "127.0.0.2" = [ config.networking.hostName ];
  };
  networking.proxy.envVars =
    lib.optionalAttrs (config.networking.proxy.httpProxy != null) {
      http_proxy = config.networking.proxy.httpProxy;
    }
    // lib.optionalAttrs (config.networking.proxy.httpsProxy != null) {
      https_proxy = config.networking.proxy.httpsProxy;
    }
    // lib.optionalAttrs (config.networking.proxy.noProxy != null) {
      no_proxy = config.networking.proxy.noProxy;
    };

  # config/sysctl.nix, tasks/network-interfaces.nix
  boot.kernel.sysctl = {
    "kernel.kptr_restrict" = lib.mkDefault 1;
    "net.ipv4.conf.all.forwarding" = lib.mkDefault false;
    "fs.inotify.max_user_instances" = lib.mkDefault 524288;
    "fs.inotify.max_user_watches" = lib.mkDefault 524288;
  };

  # config/users-groups.nix, services/networking/ssh/sshd.nix
  users.users.root = {
    uid = 0;
    group = "root";
    home = "/root";
    shell = lib.mkDefault "/run/current-system/sw/bin/bash";
    description = "System administrator";
  };
  users.groups.root.gid = 0;
  users.users.sshd = lib.mkIf config.services.openssh.enable {
    isSystemUser = true;
    group = "sshd";
    description = "SSH privilege separation user";
  };
  users.groups.sshd = lib.mkIf config.services.openssh.enable { };

  # system/boot/systemd/tmpfiles.nix: runs at boot as systemd-tmpfiles-setup, this one at a switch
  systemd.services.systemd-tmpfiles-resetup = {
    description = "Re-setup tmpfiles on a system that is already running.";
    requiredBy = [ "sysinit-reactivation.target" ];
    after = [ "local-fs.target" ];
    before = [ "sysinit-reactivation.target" ];
    unitConfig.DefaultDependencies = false;
    serviceConfig = {
      Type = "oneshot";
      RemainAfterExit = true;
      ExecStart = "systemd-tmpfiles --create --remove --exclude-prefix=/dev";
      SuccessExitStatus = "DATAERR CANTCREAT";
    };
  };

  # virtualisation/containerd.nix
  environment.systemPackages = lib.mkIf config.virtualisation.containerd.enable [ pkgs.containerd ];
  virtualisation.containerd.settings = lib.mkIf config.virtualisation.containerd.enable {
    version = 2;
    plugins."io.containerd.grpc.v1.cri".cni.bin_dir = lib.mkOptionDefault "${pkgs.cni-plugins}/bin";
  };
  systemd.services.containerd = lib.mkIf config.virtualisation.containerd.enable {
    description = "containerd - container runtime";
    wantedBy = [ "multi-user.target" ];
    after = [
      "network.target"
      "local-fs.target"
      "dbus.service"
    ];
    path = [
      pkgs.containerd
      pkgs.runc
      pkgs.iptables
    ];
    unitConfig = {
      StartLimitBurst = "16";
      StartLimitIntervalSec = "120s";
    };
    serviceConfig = {
      ExecStart = "${pkgs.containerd}/bin/containerd --config ${containerdConfig.path}";
      Type = "notify";
      Delegate = "yes";
      KillMode = "process";
      Restart = "always";
      RestartSec = "10";
      LimitNPROC = "infinity";
      LimitCORE = "infinity";
      TasksMax = "infinity";
      OOMScoreAdjust = "-999";
      StateDirectory = "containerd";
      RuntimeDirectory = "containerd";
      RuntimeDirectoryPreserve = "yes";
    };
  };
}
