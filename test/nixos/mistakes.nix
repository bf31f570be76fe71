# Modules to add to the control plane's configuration: what they get wrong, and the words in the
# error that tell (a regular expression). NixOS, or the machine, would stumble over each.
let
  serviceThatRuns =
    command:
    { pkgs, ... }:
    {
      systemd.services.mine.serviceConfig.ExecStart = command pkgs;
    };
in
{
  # ── Options ──
  "an option that does not exist" = {
    module.services.openssh.passwordAuth = false;
    says = "The option `services.openssh.passwordAuth' does not exist";
  };
  "an option that does not exist, where a condition does not hold" = {
    module =
      { lib, ... }:
      {
        boot = lib.mkIf false { loader.lilo.enable = true; };
      };
    says = "The option `boot.loader.lilo' does not exist";
  };
  "a field that networkd does not have" = {
    module.systemd.network.networks."10-lan".networkConfig.IPForward = true;
    says = "`systemd.network.networks.10-lan.networkConfig' is not of type";
  };
  "a directive that systemd does not have" = {
    module.systemd.services.etcd.serviceConfig.RestartSecs = 5;
    says = "`systemd.services.etcd.serviceConfig' is not of type";
  };
  "a string where a list belongs" = {
    module.boot.kernelModules = "overlay";
    says = "`boot.kernelModules' is not of type `list of string'";
  };
  "a number in a list of strings" = {
    module.boot.kernelModules = [ 7 ];
    says = "`boot.kernelModules.\\[definition [0-9]+-entry 1\\]' is not of type `string'";
  };
  "a wrong type in an element of a set" = {
    module.networking.hosts."192.168.100.99" = "delta";
    says = "`networking.hosts.192.168.100.99' is not of type";
  };
  "two values for an option that takes one" = {
    module.networking.hostName = "beta";
    says = "`networking.hostName' has conflicting definition values";
  };
  "a file system without a type" = {
    module.fileSystems."/data".device = "/dev/vdb";
    says = "`fileSystems./data.fsType' was accessed but has no value defined";
  };
  "settings beside config" = {
    module = {
      config = { };
      time.timeZone = "UTC";
    };
    says = "unsupported attribute `time'";
  };
  "an assertion of its own that fails" = {
    module.assertions = [
      {
        assertion = false;
        message = "the disk is too small";
      }
    ];
    says = "Failed assertions:\\s+- the disk is too small";
  };

  # ── Names ──
  "a package that does not exist" = {
    module =
      { pkgs, ... }:
      {
        environment.systemPackages = [ pkgs.kubernetes-server ];
      };
    says = "kubernetes-server";
  };
  "a function that nixpkgs does not have" = {
    module =
      { lib, ... }:
      {
        boot.kernelModules = lib.optionaly true "x";
      };
    says = "optionaly";
  };
  "an argument that nobody gives" = {
    module =
      { clusters, ... }:
      {
        networking.hostName = clusters.name;
      };
    says = "clusters";
  };

  # ── Services ──
  "a program that is not in its package" = {
    module = serviceThatRuns (pkgs: "${pkgs.kubernetes}/bin/kube-foo --all");
    says = "mine.service names .*-kubernetes/bin/kube-foo, which no package has";
  };
  "a program where other systems have theirs" = {
    module = serviceThatRuns (_: "/usr/bin/curl http://localhost/");
    says = "mine.service names /usr/bin/curl, a place that NixOS does not have";
  };
  "a folder that nobody makes" = {
    module = serviceThatRuns (pkgs: "${pkgs.curl}/bin/curl --output /opt/tools/kubectl");
    says = "mine.service names /opt/tools/kubectl, a place that NixOS does not have";
  };
  "a service without a command" = {
    module.systemd.services.mine.wantedBy = [ "multi-user.target" ];
    says = "mine.service has no ExecStart";
  };
  "a service of a user who does not exist" = {
    module =
      { lib, ... }:
      {
        systemd.services.etcd.serviceConfig.User = lib.mkForce "etcdd";
      };
    says = "etcd.service runs as etcdd:etcd, which does not exist";
  };
  "a unit that does not exist" = {
    module.systemd.services.etcd.after = [ "netwrok.target" ];
    says = "etcd.service names netwrok.target, which does not exist";
  };
  "a key that is handed to nobody" = {
    module = serviceThatRuns (
      pkgs: "${pkgs.etcd_3_6}/bin/etcd --key-file=/var/lib/kubernetes/pki/x.pem"
    );
    says = "mine.service names /var/lib/kubernetes/pki/x.pem, which no tmpfiles rule";
  };
  "a configuration file that nobody writes" = {
    module = serviceThatRuns (
      pkgs: "${pkgs.kubernetes}/bin/kubelet --config=/etc/kubernetes/k.json"
    );
    says = "mine.service names /etc/kubernetes/k.json, which no environment.etc writes";
  };

  # ── Users and files ──
  "a user without a group" = {
    module.users.users.extra.isSystemUser = true;
    says = "extra is no system user, or its group does not exist";
  };
  "a password" = {
    module =
      { lib, ... }:
      {
        users.users.root.hashedPassword = lib.mkForce "$6$x$y";
      };
    says = "root has a password";
  };
  "no way in" = {
    module =
      { lib, ... }:
      {
        users.users.root.openssh.authorizedKeys.keys = lib.mkForce [ ];
      };
    says = "root can log in by key";
  };
  "a tmpfiles rule for a user who does not exist" = {
    module.systemd.tmpfiles.rules = [ "z /etc/x 0600 etcdd root -" ];
    says = "tmpfiles rule of an unknown user: z /etc/x";
  };
  "a tmpfiles rule for a program that is not in its package" = {
    module =
      { pkgs, ... }:
      {
        systemd.tmpfiles.rules = [
          "L+ /opt/cni/bin/flannel - - - - ${pkgs.cni-plugins}/bin/flannel"
        ];
      };
    says = "a tmpfiles rule names .*/bin/flannel, which no package has";
  };
  "a key that everybody may read" = {
    module.systemd.tmpfiles.rules = [ "z /var/lib/kubernetes/pki/a-key.pem 0644 root root -" ];
    says = "a secret that others can read: .*a-key.pem";
  };
}
